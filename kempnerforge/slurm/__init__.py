"""SLURM: the identity and state of a job, batch scripts, and the requeue policy. Does not import torch."""
