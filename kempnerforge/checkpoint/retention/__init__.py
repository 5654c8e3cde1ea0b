"""Which checkpoints to keep, deleting the others, and space for the next save."""
