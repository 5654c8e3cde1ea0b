"""A small real file system, for tests of full disks."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_MNT_DETACH = 2


@contextmanager
def mounted_tmpfs(folder: Path, options: str, *, lazy: bool = False) -> Iterator[Path]:
    """Create ``folder`` and mount a tmpfs there, with ``options`` such as ``size=8m``.

    Skip the test if none can be mounted. Fail it if a file is still open at the end, unless
    ``lazy``.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    folder.mkdir()
    if libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, options.encode()):
        pytest.skip(f"a small tmpfs cannot be mounted here: {os.strerror(ctypes.get_errno())}")
    try:
        yield folder
    finally:
        if libc.umount2(bytes(folder), _MNT_DETACH if lazy else 0):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
