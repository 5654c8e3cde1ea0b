"""Put this folder on PYTHONPATH and every Python process below watches its file operations from its start."""

from __future__ import annotations

from support.crash import file_operations

file_operations.install_from_environment()
