"""When to save: policies, the automatic interval, and the measured overhead of saves."""
