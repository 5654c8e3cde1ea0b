"""End a run on purpose: signals, requests, deadlines, and the watchdog for a shutdown that hangs."""
