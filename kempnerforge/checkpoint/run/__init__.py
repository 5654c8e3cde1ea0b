"""The run that owns checkpoints: its lease, owner file, records and lineage."""
