"""Compute what a configuration requires on a number of processes, without torch and without starting any."""
