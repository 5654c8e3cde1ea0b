"""Put this folder on PYTHONPATH and every Python process below watches its file operations from its start."""

from __future__ import annotations

from crash import fileops

fileops.install_from_environment()
