"""Saving: plan, stage to host buffers, write in another process, commit."""
