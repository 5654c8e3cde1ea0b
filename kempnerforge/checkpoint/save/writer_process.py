"""The writer process: receives host buffers over a socket, writes them to files, and replies.

It is a separate process because a write that hangs in the kernel cannot be interrupted, but the
process can be abandoned and replaced. It also does not compete for the trainer's interpreter lock.
It does not import torch and takes about 20 MB.

A request is one JSON message, ``{"do", "path", "size_bytes", ...}``. A reply is one line of JSON:

=========  ==========================================  ============================================
``do``     what it does                                reply
=========  ==========================================  ============================================
write      writes the buffer, whose file descriptor    ``{"size_bytes", "xxh3_128", "write_s",
           comes with the request, as ``path``         "identity"}``
digest     computes the digests of the buffer          ``{"size_bytes", "xxh3_128", "write_s"}``
link       links ``source`` as ``path``                ``{"identity"}`` or ``{"refused", "errno"}``
=========  ==========================================  ============================================

A failure is ``{"error"}``. ``keep`` tells whether the same buffer will come again. The process ends
when the socket closes, so it never outlives its trainer. Its arguments are SOCKET_FD and PROGRESS_FD.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import select
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kempnerforge.checkpoint.save.direct_io import WriterThreads, digest_image, write_image
from kempnerforge.checkpoint.save.shared_memory import map_filled

PROGRESS_BYTES = 24
POLL_INTERVAL_S = {True: 0.002, False: 0.01}
"""Seconds between two checks of the copy's progress, by whether the save is urgent. Checks take CPU time."""
REQUEST_BYTES = 1 << 16
FileIdentity = tuple[int, int]
"""Inode and time of modification in nanoseconds: two files of one size with the same are the same file."""


class SharedProgress:
    """Counters in shared memory. The writer increments ``heartbeats``; the trainer sets the others.

    Uses ctypes, whose loads and stores of aligned 64-bit numbers are atomic.
    """

    def __init__(self, fd: int) -> None:
        memory = mmap.mmap(fd, PROGRESS_BYTES)
        self._heartbeats, self._staged, self._urgent = (
            ctypes.c_uint64.from_buffer(memory, offset) for offset in range(0, PROGRESS_BYTES, 8)
        )

    def heartbeat(self) -> None:
        """Show that the writer makes progress: increment ``heartbeats``."""
        self._heartbeats.value += 1

    @property
    def heartbeats(self) -> int:
        """How often ``heartbeat`` was called."""
        return self._heartbeats.value

    @property
    def staged(self) -> int:
        """How many bytes at the beginning of the buffer that is being written are final."""
        return self._staged.value

    @staged.setter
    def staged(self, size_bytes: int) -> None:
        self._staged.value = size_bytes

    @property
    def urgent(self) -> bool:
        """Whether the trainer waits for the file that is being written."""
        return bool(self._urgent.value)

    @urgent.setter
    def urgent(self, urgent: bool) -> None:
        self._urgent.value = urgent


class MappedBuffers:
    """Keeps the mappings of buffers that were sent before, because a new mapping causes page faults."""

    def __init__(self) -> None:
        self._by_inode: dict[int, memoryview] = {}

    def view(self, fd: int, *, keep: bool) -> memoryview:
        """Return the memory of ``fd``, and close ``fd``. ``keep``: later requests may reuse the mapping."""
        try:
            status = os.fstat(fd)
            memory = self._by_inode.get(status.st_ino)
            if memory is None or len(memory) != status.st_size:
                memory = map_filled(fd, status.st_size)
                if keep:
                    self._by_inode[status.st_ino] = memory
        finally:
            os.close(fd)
        return memory


def serve(connection: socket.socket, progress: SharedProgress) -> None:
    """Answer requests until the trainer closes the socket."""
    buffers, threads = MappedBuffers(), WriterThreads()
    first: Path | None = None
    with contextlib.suppress(ConnectionError):  # the trainer was killed
        while True:
            data, fds, _, _ = socket.recv_fds(connection, REQUEST_BYTES, 1)
            if not data:
                break
            request = json.loads(data)
            path = Path(request["path"])
            first = path if path.name.startswith("shard_00000_of_") else first
            if request["do"] == "link":
                answer = _link(request, progress.heartbeat)
            else:
                image = buffers.view(fds[0], keep=request["keep"])
                answer = _answer(request, image, threads, progress, connection)
                del image
            connection.sendall(json.dumps(answer).encode() + b"\n")
    if first is not None:
        _report_loss(first)


def _report_loss(first: Path) -> None:
    """Report on standard error that the trainer ended before it committed its last save. First rank only.

    ``first``: the first shard of that save. A trainer that ends normally finishes its saves and then
    ends this process with SIGKILL.
    """
    if first.parent.exists():
        with contextlib.suppress(OSError):  # standard error may be closed
            print(
                f"kempnerforge: {first.parent} is not committed: the process that saved it was ended",
                file=sys.stderr,
                flush=True,
            )


def _answer(
    request: dict[str, Any],
    image: memoryview,
    threads: WriterThreads,
    progress: SharedProgress,
    connection: socket.socket,
) -> dict[str, Any]:
    started = time.perf_counter()
    path, size_bytes = Path(request["path"]), request["size_bytes"]
    writes = request["do"] == "write"
    options: dict[str, Any] = {
        "heartbeat": progress.heartbeat,
        "wait_until_staged": lambda end: _wait_until_staged(progress, end, connection),
        "is_urgent": lambda: progress.urgent,
    }
    try:
        if writes:
            record = write_image(image, path, size_bytes, threads, **options)
        else:
            record = digest_image(image, size_bytes, threads, **options)
        identity = {"identity": identity_of(os.lstat(path))} if writes else {}
    except OSError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "size_bytes": record.size_bytes,
        "xxh3_128": record.xxh3_128,
        "write_s": time.perf_counter() - started,
        **identity,
    }


def identity_of(found: os.stat_result) -> FileIdentity:
    """Return what tells a file from another one that was put in its place."""
    return found.st_ino, found.st_mtime_ns


def _link(request: dict[str, Any], heartbeat: Callable[[], None]) -> dict[str, Any]:
    """Link a file, unless it is another one than the one that is meant."""
    source, path, identity = Path(request["source"]), Path(request["path"]), request["identity"]
    try:
        path.unlink(missing_ok=True)
        heartbeat()
        os.link(source, path, follow_symlinks=False)
        heartbeat()
        found = os.lstat(path)
        is_same = identity is None or list(identity_of(found)) == identity
        if not stat.S_ISREG(found.st_mode) or found.st_size != request["size_bytes"] or not is_same:
            path.unlink()
            return {"refused": f"{source} was replaced by another file", "errno": None}
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        return {"refused": f"{type(error).__name__}: {error}", "errno": error.errno}
    return {"identity": identity_of(found)}


def _wait_until_staged(progress: SharedProgress, end: int, connection: socket.socket) -> None:
    """Return when the first ``end`` bytes are final. Raises ConnectionError when the trainer is gone."""
    # Not ``select``, which takes no descriptor above 1,023, and the trainer may have many files open.
    trainer = select.poll()
    trainer.register(connection, select.POLLIN)
    if trainer.poll(0):  # nobody would commit what is written
        raise ConnectionAbortedError("the trainer is gone")
    while progress.staged < end:
        progress.heartbeat()
        if trainer.poll(1000 * POLL_INTERVAL_S[progress.urgent]):  # it sends nothing before the reply
            raise ConnectionAbortedError("the trainer is gone")


def main() -> None:
    """Serve the trainer that started this process."""
    # The trainer decides when to stop: signals to the process group are for the trainer.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    os.nice(5)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        serve(connection, SharedProgress(int(sys.argv[2])))
