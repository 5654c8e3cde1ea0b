"""The run that checkpoints belong to: its lease, owner, records and lineage."""
