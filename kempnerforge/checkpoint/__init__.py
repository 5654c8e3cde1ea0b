"""Saving and resuming: staging, storage, commit, resume. Knows nothing of models, data or the loop."""
