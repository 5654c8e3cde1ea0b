"""Operations on checkpoints for the command line: verify, diff, roll back, fork, export, import."""
