"""What the command line does with checkpoints: verify, diff, roll back, fork, export, import."""
