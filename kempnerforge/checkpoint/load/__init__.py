"""Loading: choose a step, check that it fits, and read it into a state."""
