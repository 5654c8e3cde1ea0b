"""What a configuration needs on a number of processes: arithmetic without torch or processes."""
