"""Write a host buffer to a file in large direct writes, and compute the digests of its blocks.

The CPU time of the writer slows training during a save, and the page cache would copy every byte
once more. So blocks are written from the buffer itself (``O_DIRECT``) where the file system
supports that, and a block is digested while it is being written. The writer process imports this
module, so it does not use torch.
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
"""Host buffers are padded to a multiple of it, as direct writes require."""

_SYNC_BLOCKS = 4
_SLOW_BLOCK_S = 1.0
"""If a block takes longer, perhaps for lack of an idle core, the rest of the file is written as urgent."""


_AT_ONCE = 2
"""Threads of one priority: one digests a block while the other writes it."""


def padded(size_bytes: int) -> int:
    """Return ``size_bytes`` rounded up to a multiple of the alignment."""
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT


def write_image(
    image: memoryview,
    path: Path,
    size_bytes: int,
    threads: WriterThreads,
    *,
    heartbeat: Callable[[], None] = lambda: None,
    wait_until_staged: Callable[[int], None] = lambda end: None,
    is_urgent: Callable[[], bool] = lambda: True,
) -> FileRecord:
    """Write the first ``size_bytes`` of ``image`` as the new file ``path`` and fsync it.

    ``image`` is page-aligned and at least ``padded(size_bytes)`` long. ``heartbeat`` is called
    after every system call that may take long, so that a slow disk is not taken for a hang.
    ``wait_until_staged(end)`` returns when the first ``end`` bytes of the image are final.
    ``is_urgent`` is called before each block and returns whether the trainer waits for the file.
    Durable on return, except for the folder's entry. Replaces an unfinished file of an earlier try.
    """
    path.unlink(missing_ok=True)
    heartbeat()
    fd, direct = _open(path, heartbeat)
    heartbeat()
    try:
        digests = []
        slow = False
        for begin in range(0, size_bytes, BLOCK_BYTES):
            end = min(begin + BLOCK_BYTES, size_bytes)
            wait_until_staged(end)
            started = time.monotonic()
            pool = threads.pick(urgent=slow or is_urgent())
            digest = pool.submit(xxhash.xxh3_128_hexdigest, image[begin:end])
            pool.submit(
                _write_at, fd, image[begin : padded(end) if direct else end], begin, heartbeat
            ).result()
            digests.append(digest.result())
            slow = slow or time.monotonic() - started > _SLOW_BLOCK_S
            direct = direct and _is_direct(fd)
            if not direct and len(digests) % _SYNC_BLOCKS == 0:
                # One fsync over gigabytes of dirty pages would look like a hang, and stall other processes.
                os.fdatasync(fd)
                heartbeat()
        os.ftruncate(fd, size_bytes)
        heartbeat()
        os.fsync(fd)
    finally:
        os.close(fd)
    return FileRecord(size_bytes, tuple(digests))


def digest_image(
    image: memoryview,
    size_bytes: int,
    threads: WriterThreads,
    *,
    heartbeat: Callable[[], None] = lambda: None,
    wait_until_staged: Callable[[int], None] = lambda end: None,
    is_urgent: Callable[[], bool] = lambda: True,
) -> FileRecord:
    """Return the record that ``write_image`` would return. Writes nothing."""
    digests = []
    for begin in range(0, size_bytes, BLOCK_BYTES):
        end = min(begin + BLOCK_BYTES, size_bytes)
        wait_until_staged(end)
        pool = threads.pick(urgent=is_urgent())
        digests.append(pool.submit(xxhash.xxh3_128_hexdigest, image[begin:end]).result())
        heartbeat()
    return FileRecord(size_bytes, tuple(digests))


def _open(path: Path, heartbeat: Callable[[], None]) -> tuple[int, bool]:
    flags = os.O_WRONLY | os.O_EXCL
    try:
        return fsio.open_file(path, flags | os.O_DIRECT), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    # tmpfs and some network file systems refuse O_DIRECT, and may have created the file nevertheless.
    heartbeat()
    path.unlink(missing_ok=True)
    heartbeat()
    return fsio.open_file(path, flags), False


def _write_at(fd: int, data: memoryview, offset: int, heartbeat: Callable[[], None]) -> None:
    while data.nbytes:
        try:
            written = os.pwrite(fd, data, offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not _is_direct(fd):
                raise
            # The file system opened the file for direct writes and refuses them, or requires larger ones.
            _clear_direct(fd)
            continue
        heartbeat()
        if written == 0:
            raise OSError(errno.EIO, "pwrite() wrote nothing")
        if written < data.nbytes and written % ALIGNMENT:
            # The rest of this block is no longer aligned: write it through the page cache.
            _clear_direct(fd)
        data, offset = data[written:], offset + written


def _is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


def _clear_direct(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)


class WriterThreads:
    """Threads of ordinary priority, and threads that run only when a core would otherwise be idle.

    Ranks wait for each other in every step, so CPU time that a writer takes from one rank delays
    all ranks. A thread cannot raise its own priority again without privileges, so there are threads
    of both kinds.
    """

    def __init__(self) -> None:
        self._urgent = ThreadPoolExecutor(_AT_ONCE)
        self._idle = ThreadPoolExecutor(_AT_ONCE, initializer=_use_idle_time_only)

    def pick(self, *, urgent: bool) -> Executor:
        """Return the threads to work on. ``urgent``: the trainer waits for the result."""
        return self._urgent if urgent else self._idle


def _use_idle_time_only() -> None:
    """Set the calling thread to ``SCHED_IDLE``, or, where that is forbidden, to the lowest niceness."""
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except OSError:
        os.nice(19)
