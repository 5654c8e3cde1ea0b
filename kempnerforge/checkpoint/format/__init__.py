"""A checkpoint on disk: names, the manifest, the tensor index, shard files and checksums."""
