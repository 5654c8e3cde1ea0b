"""The format of a checkpoint on disk: names, manifest, tensor index, shard files, checksums."""
