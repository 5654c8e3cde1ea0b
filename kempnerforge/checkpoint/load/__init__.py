"""Loading: which step to resume from, whether it fits, and reading it into a state."""
