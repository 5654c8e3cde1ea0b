"""The writer process: takes arenas over a socket, writes them, reports. No torch, about 20 MB.

A process, not a thread: a write that hangs in the kernel cannot be interrupted, but a process can be left
behind and replaced; and nothing here competes for the trainer's interpreter lock.

One JSON message a request, with the arena's file descriptor beside it: ``{"path", "size_bytes"}``. One JSON
line a reply: ``{"size_bytes", "xxh3_128", "write_s"}`` or ``{"error"}``. It ends when the socket closes, so
it never outlives its trainer. Started as
``python -m kempnerforge.checkpoint.writer_main SOCKET_FD PULSE_FD``.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from kempnerforge.checkpoint.image_writer import write_image

PULSE_BYTES = 8
REQUEST_BYTES = 1 << 16


class Pulse:
    """A counter in shared memory that moves while the writer does something."""

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, PULSE_BYTES)

    def beat(self) -> None:
        """Move on."""
        self._memory[:] = (self.read() + 1).to_bytes(PULSE_BYTES, "little")

    def read(self) -> int:
        """The count."""
        return int.from_bytes(self._memory[:], "little")


class Arenas:
    """Mappings of arenas that have been sent before: mapping a gigabyte anew costs its page faults."""

    def __init__(self) -> None:
        self._by_inode: dict[int, mmap.mmap] = {}

    def view(self, fd: int) -> memoryview:
        """The arena behind ``fd``, which is closed."""
        try:
            status = os.fstat(fd)
            known = self._by_inode.get(status.st_ino)
            if known is None or len(known) != status.st_size:
                known = mmap.mmap(fd, status.st_size, prot=mmap.PROT_READ)
                self._by_inode[status.st_ino] = known
        finally:
            os.close(fd)
        return memoryview(known)


def serve(connection: socket.socket, pulse: Pulse) -> None:
    """Answer requests until the other side is gone."""
    arenas = Arenas()
    while True:
        try:
            data, fds, _, _ = socket.recv_fds(connection, REQUEST_BYTES, 1)
            if not data:
                return
            answer = _answer(json.loads(data), arenas.view(fds[0]), pulse)
            connection.sendall(json.dumps(answer).encode() + b"\n")
        except ConnectionError:  # the trainer was killed
            return


def _answer(request: dict[str, Any], image: memoryview, pulse: Pulse) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        record = write_image(image, Path(request["path"]), request["size_bytes"], beat=pulse.beat)
    except OSError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "size_bytes": record.size_bytes,
        "xxh3_128": record.xxh3_128,
        "write_s": time.perf_counter() - started,
    }


def main() -> None:
    """Entry point."""
    # The trainer decides when to stop; signals for the whole process group are meant for it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    os.nice(5)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        serve(connection, Pulse(int(sys.argv[2])))


if __name__ == "__main__":
    main()
