"""Retention: which checkpoints to keep, deletion of the others, and space for the next save."""
