"""With this folder on PYTHONPATH, every Python process watches its file operations from its start."""

from __future__ import annotations

from support.crash import file_operations

file_operations.install_from_environment()
