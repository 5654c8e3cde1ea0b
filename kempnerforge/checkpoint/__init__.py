"""Saving and resuming. Imports nothing from the model, the data or the training loop."""
