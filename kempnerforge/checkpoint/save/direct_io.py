"""Write an arena, the image of a file, to disk: large direct writes, digested on the way.

CPU time is what slows a training step beside a save, and the page cache costs one copy of every byte; so
blocks go to the device from the arena itself (``O_DIRECT``) where the file system can do that, and the digest
of the next block is computed while one is being written. No torch here: the writer process runs this.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import xxhash

from kempnerforge import fsio
from kempnerforge.checkpoint.format.checksums import BLOCK_BYTES, FileRecord

ALIGNMENT = 4096
"""Arenas are padded to a multiple of it, which direct writes need."""

_SYNC_BLOCKS = 4
_SLOW_BLOCK_S = 1.0
"""A block that takes so long may find no idle core: the file's others do not wait for one."""


_AT_ONCE = 2
"""Threads of one priority: one digests a block while the other writes it."""


def padded(size_bytes: int) -> int:
    """``size_bytes`` up to the next multiple of the alignment."""
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT


def write_image(
    image: memoryview,
    path: Path,
    size_bytes: int,
    lanes: WriterThreads,
    *,
    beat: Callable[[], None] = lambda: None,
    until: Callable[[int], None] = lambda end: None,
    prompt: Callable[[], bool] = lambda: True,
) -> FileRecord:
    """Write the first ``size_bytes`` of ``image`` as the new file ``path`` and fsync it.

    ``image`` is page-aligned and at least ``padded(size_bytes)`` long. ``beat`` is called after every system
    call that may take long: a slow disk is not a hang. ``until`` returns when the image's first so many bytes
    are there. ``prompt`` tells, before each block, whether somebody waits for the file.
    Durable on return, but for the folder's entry. An unfinished file of an earlier try is replaced.
    """
    path.unlink(missing_ok=True)
    beat()
    fd, direct = _open(path, beat)
    beat()
    try:
        digests = []
        slow = False
        for begin in range(0, size_bytes, BLOCK_BYTES):
            end = min(begin + BLOCK_BYTES, size_bytes)
            until(end)
            started = time.monotonic()
            lane = lanes.pick(prompt=slow or prompt())
            digest = lane.submit(xxhash.xxh3_128_hexdigest, image[begin:end])
            lane.submit(_write_at, fd, image[begin : padded(end) if direct else end], begin, beat).result()
            digests.append(digest.result())
            slow = slow or time.monotonic() - started > _SLOW_BLOCK_S
            direct = direct and _is_direct(fd)
            if not direct and len(digests) % _SYNC_BLOCKS == 0:
                # One fsync over gigabytes of dirty pages looks like a hang, and stalls others.
                os.fdatasync(fd)
                beat()
        os.ftruncate(fd, size_bytes)
        beat()
        os.fsync(fd)
    finally:
        os.close(fd)
    return FileRecord(size_bytes, tuple(digests))


def _open(path: Path, beat: Callable[[], None]) -> tuple[int, bool]:
    flags = os.O_WRONLY | os.O_EXCL
    try:
        return fsio.open_file(path, flags | os.O_DIRECT), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    # tmpfs and some network file systems: the file may exist already, made by the open that was refused.
    beat()
    path.unlink(missing_ok=True)
    beat()
    return fsio.open_file(path, flags), False


def _write_at(fd: int, data: memoryview, offset: int, beat: Callable[[], None]) -> None:
    while data.nbytes:
        try:
            written = os.pwrite(fd, data, offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not _is_direct(fd):
                raise
            # A file system that opens a file for direct writes and then refuses them, or wants them larger.
            _clear_direct(fd)
            continue
        beat()
        if written == 0:
            raise OSError(errno.EIO, "pwrite() wrote nothing")
        if written < data.nbytes and written % ALIGNMENT:
            # What is left is no longer aligned: the rest of this block goes through the page cache.
            _clear_direct(fd)
        data, offset = data[written:], offset + written


def _is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


def _clear_direct(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)


class WriterThreads:
    """Threads that work when they can, and threads that work only when a core would else be idle.

    Ranks wait for each other in every step: what a writer takes from one of them all lose. A thread's policy
    cannot be raised again without privileges, so there are threads for either.
    """

    def __init__(self) -> None:
        self._prompt = ThreadPoolExecutor(_AT_ONCE)
        self._idle = ThreadPoolExecutor(_AT_ONCE, initializer=_yield_to_all)

    def pick(self, *, prompt: bool) -> Executor:
        """Where to work; ``prompt``: somebody waits for it."""
        return self._prompt if prompt else self._idle


def _yield_to_all() -> None:
    """The calling thread only: ``SCHED_IDLE``, or the lowest of the ordinary ones where it is forbidden."""
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except OSError:
        os.nice(19)
