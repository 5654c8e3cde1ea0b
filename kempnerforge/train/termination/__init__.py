"""Ending a run on purpose: signals, requests, deadlines, and the watchdog for an end that hangs."""
