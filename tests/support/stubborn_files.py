"""Real files that cannot be renamed or deleted: immutable ones, lower layers of a container, mount points.

All need the rights of root. Tests that use one are skipped where it is not available.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.tmpfs import mounted_tmpfs

_GET_FLAGS, _SET_FLAGS, _IMMUTABLE = 0x80086601, 0x40086602, 0x10
_MS_BIND, _MNT_DETACH = 0x1000, 2


@contextlib.contextmanager
def immutable(path: Path) -> Iterator[None]:
    """Apply ``chattr +i``: nobody, including root, can rename, change or delete the file."""
    fd = os.open(path, os.O_RDONLY)  # the folder above may be renamed in the meantime
    try:
        _set_immutable(fd, True)
    except OSError as error:
        os.close(fd)
        pytest.skip(f"chattr +i does not work here: {error}")
    try:
        yield
    finally:
        _set_immutable(fd, False)
        os.close(fd)


def _set_immutable(fd: int, on: bool) -> None:
    flags = array.array("l", [0])
    fcntl.ioctl(fd, _GET_FLAGS, flags)
    flags[0] = flags[0] | _IMMUTABLE if on else flags[0] & ~_IMMUTABLE
    fcntl.ioctl(fd, _SET_FLAGS, flags)


@contextlib.contextmanager
def over_lower_layer(lower: Path, base: Path) -> Iterator[Path]:
    """Mount ``lower`` as in a container: its folders cannot be renamed (EXDEV). ``base`` is a new folder."""
    with mounted_tmpfs(base, "size=64m", lazy=True):
        for name in ("upper", "work", "merged"):
            (base / name).mkdir()
        options = f"lowerdir={lower},upperdir={base}/upper,workdir={base}/work"
        with _mounted(b"overlay", base / "merged", b"overlay", 0, options.encode()):
            yield base / "merged"


@contextlib.contextmanager
def bind_mounted(source: Path, target: Path) -> Iterator[None]:
    """Show ``source`` at ``target``, an existing folder."""
    with _mounted(bytes(source), target, b"", _MS_BIND, b""):
        yield


@contextlib.contextmanager
def _mounted(source: bytes, target: Path, kind: bytes, flags: int, options: bytes) -> Iterator[None]:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source, bytes(target), kind, flags, options):
        pytest.skip(f"nothing can be mounted here: {os.strerror(ctypes.get_errno())}")
    fd = os.open(target, os.O_PATH)  # the folder above may be renamed in the meantime
    try:
        yield
    finally:
        failed = libc.umount2(f"/proc/self/fd/{fd}".encode(), _MNT_DETACH)
        os.close(fd)
        if failed:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(target))
