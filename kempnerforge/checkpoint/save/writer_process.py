"""The writer process: takes arenas over a socket, writes them, reports. No torch, about 20 MB.

A process, not a thread: a write that hangs in the kernel cannot be interrupted, but a process can be left
behind and replaced; and nothing here competes for the trainer's interpreter lock.

One JSON message a request, with the arena's file descriptor beside it: ``{"path", "size_bytes"}``. One JSON
line a reply: ``{"size_bytes", "xxh3_128", "write_s"}`` or ``{"error"}``. It ends when the socket closes, so
it never outlives its trainer. Started as
``python -m kempnerforge.checkpoint.save.writer_process SOCKET_FD PULSE_FD``.
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
import sys
import time
from pathlib import Path
from typing import Any

from kempnerforge.checkpoint.save.direct_io import WriterThreads, write_image
from kempnerforge.checkpoint.save.shared_memory import map_filled

PULSE_BYTES = 24
POLL_INTERVAL_S = {True: 0.002, False: 0.01}
"""Between two looks at how far the trainer's copy is, by whether somebody waits: a look takes time."""
REQUEST_BYTES = 1 << 16


class SharedProgress:
    """Numbers in shared memory: ``beats`` moves while the writer works, the others are the trainer's.

    Through ctypes, whose loads and stores of aligned 64-bit numbers are never torn.
    """

    def __init__(self, fd: int) -> None:
        memory = mmap.mmap(fd, PULSE_BYTES)
        self._beats, self._staged, self._prompt = (
            ctypes.c_uint64.from_buffer(memory, offset) for offset in range(0, PULSE_BYTES, 8)
        )

    def beat(self) -> None:
        """Move on."""
        self._beats.value += 1

    @property
    def beats(self) -> int:
        """The count."""
        return self._beats.value

    @property
    def staged(self) -> int:
        """How many bytes of the arena that is being written are there."""
        return self._staged.value

    @staged.setter
    def staged(self, size_bytes: int) -> None:
        self._staged.value = size_bytes

    @property
    def prompt(self) -> bool:
        """Whether somebody waits for what is being written."""
        return bool(self._prompt.value)

    @prompt.setter
    def prompt(self, waits: bool) -> None:
        self._prompt.value = waits


class Arenas:
    """Mappings of arenas that have been sent before: mapping a gigabyte anew costs its page faults."""

    def __init__(self) -> None:
        self._by_inode: dict[int, memoryview] = {}

    def view(self, fd: int) -> memoryview:
        """The arena behind ``fd``, which is closed."""
        try:
            status = os.fstat(fd)
            known = self._by_inode.get(status.st_ino)
            if known is None or len(known) != status.st_size:
                known = map_filled(fd, status.st_size)
                self._by_inode[status.st_ino] = known
        finally:
            os.close(fd)
        return known


def serve(connection: socket.socket, pulse: SharedProgress) -> None:
    """Answer requests until the other side is gone."""
    arenas, lanes = Arenas(), WriterThreads()
    path: Path | None = None
    with contextlib.suppress(ConnectionError):  # the trainer was killed
        while True:
            data, fds, _, _ = socket.recv_fds(connection, REQUEST_BYTES, 1)
            if not data:
                break
            request = json.loads(data)
            path = Path(request["path"])
            answer = _answer(request, arenas.view(fds[0]), lanes, pulse, connection)
            connection.sendall(json.dumps(answer).encode() + b"\n")
    if path is not None:
        _report_loss(path)


def _report_loss(path: Path) -> None:
    """Say on standard error that the trainer ended before it committed its last save; the first rank says it.

    A trainer that ends by itself finishes its saves and then ends this process with SIGKILL.
    """
    if path.name.startswith("shard_00000_of_") and path.parent.exists():
        with contextlib.suppress(OSError):  # nobody listens any more
            print(
                f"kempnerforge: {path.parent} is not committed: the process that saved it was ended",
                file=sys.stderr,
                flush=True,
            )


def _answer(
    request: dict[str, Any],
    image: memoryview,
    lanes: WriterThreads,
    pulse: SharedProgress,
    connection: socket.socket,
) -> dict[str, Any]:
    started = time.perf_counter()
    path, size_bytes = Path(request["path"]), request["size_bytes"]
    try:
        record = write_image(
            image,
            path,
            size_bytes,
            lanes,
            beat=pulse.beat,
            until=lambda end: _follow(pulse, end, connection),
            prompt=lambda: pulse.prompt,
        )
    except OSError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "size_bytes": record.size_bytes,
        "xxh3_128": record.xxh3_128,
        "write_s": time.perf_counter() - started,
    }


def _follow(pulse: SharedProgress, end: int, connection: socket.socket) -> None:
    """Return when the arena has its first ``end`` bytes. Raises ConnectionError when the trainer is gone."""
    if select.select([connection], [], [], 0)[0]:  # a write of what nobody will commit only takes time
        raise ConnectionAbortedError("the trainer is gone")
    while pulse.staged < end:
        pulse.beat()
        closed, _, _ = select.select([connection], [], [], POLL_INTERVAL_S[pulse.prompt])
        if closed:  # nothing is sent before an answer
            raise ConnectionAbortedError("the trainer is gone")


def main() -> None:
    """Entry point."""
    # The trainer decides when to stop; signals for the whole process group are meant for it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    os.nice(5)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        serve(connection, SharedProgress(int(sys.argv[2])))


if __name__ == "__main__":
    main()
