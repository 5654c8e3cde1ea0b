"""The trainer's side of the writer process: start it, give it work, notice when it dies or hangs."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kempnerforge.checkpoint.format.checksums import FileRecord
from kempnerforge.checkpoint.save.writer_process import POLL_INTERVAL_S, PULSE_BYTES, SharedProgress
from kempnerforge.errors import SaveFailedError

_POLL_S = 0.2


class WriterFailedError(Exception):
    """A write failed in the writer process, or the writer itself died or hung. Worth another try."""


@dataclass(frozen=True)
class Written:
    """What the writer says of one file."""

    record: FileRecord
    write_s: float


class Writer:
    """One writer process, started when first needed and replaced when it dies or hangs."""

    def __init__(self, *, stall_timeout_s: float) -> None:
        self._stall_timeout_s = stall_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._pulse: SharedProgress | None = None
        self._prompt = True
        self._telling = threading.Lock()

    def set_priority(self, waits: bool) -> None:
        """Whether somebody waits for what is or will be written; else it takes idle time only. Any thread."""
        with self._telling:
            self._prompt = waits
            pulse = self._pulse  # ``_kill`` may forget it meanwhile
            if pulse is not None:
                pulse.prompt = waits

    @property
    def pid(self) -> int | None:
        """The process, while there is one."""
        return self._process.pid if self._process is not None else None

    def write(
        self,
        arena_fd: int,
        path: Path,
        size_bytes: int,
        *,
        staged: Callable[[], int] | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> Written:
        """Write the arena's first ``size_bytes`` as ``path``. Blocks until it is durable.

        ``staged`` tells how many of them are there as they will stay: the writer follows; None is all.
        ``check`` is called now and then. What either raises, SaveFailedError, ends the write: the writer
        process is killed, so that the arena is free again. Raises WriterFailedError; the writer is replaced
        by a new one for the next call if it was at fault.
        """
        connection, pulse = self._start()
        staged = staged or (lambda: size_bytes)
        pulse.staged = staged()
        with self._telling:
            pulse.prompt = self._prompt
        request = json.dumps({"path": str(path), "size_bytes": size_bytes}).encode()
        try:
            socket.send_fds(connection, [request], [arena_fd])
            answer = json.loads(self._receive(connection, pulse, size_bytes, staged, check))
        except SaveFailedError:
            self._kill()  # it waits for bytes that will not come, or writes what nobody will commit
            raise
        except (OSError, ValueError) as error:
            status = self._kill()
            raise WriterFailedError(
                f"writer process died (status {status}) while writing {path.name}"
            ) from error
        if "error" in answer:
            raise WriterFailedError(f"{path.name}: {answer['error']}")
        return Written(FileRecord(answer["size_bytes"], tuple(answer["xxh3_128"])), answer["write_s"])

    def _receive(
        self,
        connection: socket.socket,
        pulse: SharedProgress,
        size_bytes: int,
        staged: Callable[[], int],
        check: Callable[[], None],
    ) -> bytes:
        received = b""
        seen, moved_at = pulse.beats, time.monotonic()
        while not received.endswith(b"\n"):
            if pulse.staged < size_bytes:
                pulse.staged = staged()
            connection.settimeout(_POLL_S if pulse.staged >= size_bytes else POLL_INTERVAL_S[pulse.prompt])
            try:
                data = connection.recv(1 << 20)
            except TimeoutError:
                check()
                if pulse.beats != seen:
                    seen, moved_at = pulse.beats, time.monotonic()
                elif time.monotonic() - moved_at > self._stall_timeout_s:
                    pid, stalled_s = self.pid, self._stall_timeout_s
                    self._kill()
                    raise WriterFailedError(
                        f"writer process {pid} made no progress for {stalled_s:.0f} s and was replaced"
                    ) from None
                continue
            if not data:
                raise ConnectionError("the writer closed its socket")
            received += data
        return received

    def _start(self) -> tuple[socket.socket, SharedProgress]:
        if self._process is not None and self._process.poll() is not None:
            self._kill()
        if self._connection is None or self._pulse is None:
            pulse_fd = os.memfd_create("kempnerforge-pulse")
            os.ftruncate(pulse_fd, PULSE_BYTES)
            ours, theirs = socket.socketpair()
            with theirs:
                self._process = subprocess.Popen(
                    [
                        sys.executable,
                        "-m",
                        "kempnerforge.checkpoint.save.writer_process",
                        str(theirs.fileno()),
                        str(pulse_fd),
                    ],
                    pass_fds=[theirs.fileno(), pulse_fd],
                    stdin=subprocess.DEVNULL,
                )
            self._connection, self._pulse = ours, SharedProgress(pulse_fd)
            os.close(pulse_fd)
        return self._connection, self._pulse

    def _kill(self) -> int | None:
        """End the process at once. A process that hangs in the kernel is left behind: it owns no name."""
        process, self._process = self._process, None
        if self._connection is not None:
            self._connection.close()
        self._connection = self._pulse = None
        if process is None:
            return None
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=1.0)
        return None

    def close(self) -> None:
        """End the process; it is idle when no ``write`` is under way."""
        self._kill()


def with_backoff(
    work: Callable[[], Written],
    *,
    tries: int,
    first_pause_s: float,
    sleep: Callable[[float], None] = time.sleep,
) -> Written:
    """Run ``work`` up to ``tries`` times with doubling pauses. Raises the last WriterFailedError."""
    pause_s = first_pause_s
    for left in range(tries - 1, -1, -1):
        try:
            return work()
        except WriterFailedError:
            if left == 0:
                raise
            sleep(pause_s)
            pause_s *= 2
    raise AssertionError("tries is at least 1")
