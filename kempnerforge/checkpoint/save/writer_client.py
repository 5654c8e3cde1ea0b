"""The trainer's side of the writer process: start it, send requests, replace it when it dies or hangs."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kempnerforge.checkpoint.format.checksums import FileRecord
from kempnerforge.checkpoint.save import writer_process
from kempnerforge.checkpoint.save.writer_process import (
    POLL_INTERVAL_S,
    PROGRESS_BYTES,
    FileIdentity,
    SharedProgress,
)
from kempnerforge.errors import SaveFailedError
from kempnerforge.python_process import command

log = logging.getLogger(__name__)

T = TypeVar("T")

_POLL_S = 0.2


class WriterFailedError(Exception):
    """A write failed in the writer process, or the process died or hung. The write can be tried again."""


@dataclass(frozen=True)
class Written:
    """The writer's reply for one file."""

    record: FileRecord
    write_s: float
    identity: FileIdentity = (0, 0)


@dataclass(frozen=True)
class LinkResult:
    """The writer's reply for one link."""

    identity: FileIdentity = (0, 0)
    refused: str = ""
    """Why there is no link; empty if there is one."""
    errno: int | None = None


class Writer:
    """One writer process. Started when first needed, replaced when it dies or hangs."""

    def __init__(self, *, stall_timeout_s: float) -> None:
        self._stall_timeout_s = stall_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._progress: SharedProgress | None = None
        self._urgent = True
        self._lock = threading.Lock()

    def set_priority(self, *, urgent: bool) -> None:
        """Set whether the trainer waits for writes. If not, they use idle CPU time only. Any thread."""
        with self._lock:
            self._urgent = urgent
            progress = self._progress  # ``_kill`` may reset it meanwhile
            if progress is not None:
                progress.urgent = urgent

    @property
    def pid(self) -> int | None:
        """Id of the process, while there is one."""
        return self._process.pid if self._process is not None else None

    def write(
        self,
        buffer_fd: int,
        path: Path,
        size_bytes: int,
        *,
        staged: Callable[[], int] | None = None,
        check: Callable[[], None] = lambda: None,
        keep: bool = True,
    ) -> Written:
        """Write the first ``size_bytes`` of the buffer ``buffer_fd`` as ``path``. Return when it is durable.

        ``staged`` returns how many of these bytes are final; the writer waits for the rest. None:
        all are final. ``check`` is called regularly. If either function raises SaveFailedError, the
        write ends and the writer process is killed, so that the buffer is free again. Raises
        WriterFailedError when the write failed. A writer process that caused the failure is
        replaced at the next call. ``keep``: whether the same buffer will be written again.
        """
        request = {"do": "write", "path": str(path), "size_bytes": size_bytes, "keep": keep}
        answer = self._ask(request, [buffer_fd], path.name, staged, check)
        identity = tuple(answer["identity"])
        return Written(
            FileRecord(answer["size_bytes"], tuple(answer["xxh3_128"])), answer["write_s"], identity
        )

    def digest(
        self,
        buffer_fd: int,
        path: Path,
        size_bytes: int,
        *,
        staged: Callable[[], int] | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> Written:
        """Return what ``write`` would return, but write nothing. Raises what ``write`` raises."""
        request = {"do": "digest", "path": str(path), "size_bytes": size_bytes, "keep": False}
        answer = self._ask(request, [buffer_fd], path.name, staged, check)
        return Written(FileRecord(answer["size_bytes"], tuple(answer["xxh3_128"])), answer["write_s"])

    def link(
        self,
        source: Path,
        path: Path,
        size_bytes: int,
        identity: FileIdentity | None,
        *,
        check: Callable[[], None] = lambda: None,
    ) -> LinkResult:
        """Link ``source`` as ``path``, if it is the file with ``identity``; None: any file of the size.

        Raises WriterFailedError if the process died or hung. A link that the file system refuses is
        a result.
        """
        request = {
            "do": "link",
            "path": str(path),
            "source": str(source),
            "size_bytes": size_bytes,
            "identity": identity,
        }
        answer = self._ask(request, [], path.name, None, check)
        if "refused" in answer:
            return LinkResult(refused=answer["refused"], errno=answer["errno"])
        return LinkResult(tuple(answer["identity"]))

    def _ask(
        self,
        body: dict[str, Any],
        fds: list[int],
        name: str,
        staged: Callable[[], int] | None,
        check: Callable[[], None],
    ) -> dict[str, Any]:
        """Send one request and return the reply. Raises as ``write`` does."""
        connection, progress = self._start()
        size_bytes: int = body["size_bytes"]
        staged = staged or (lambda: size_bytes)
        progress.staged = staged()
        with self._lock:
            progress.urgent = self._urgent
        request = json.dumps(body).encode()
        try:
            socket.send_fds(connection, [request], fds)
            answer: dict[str, Any] = json.loads(
                self._receive(connection, progress, size_bytes, staged, check)
            )
        except SaveFailedError:
            self._kill()  # else it would wait for bytes that are never staged
            raise
        except (OSError, ValueError) as error:
            status = self._kill()
            raise WriterFailedError(f"writer process died (status {status}) while writing {name}") from error
        if "error" in answer:
            raise WriterFailedError(f"{name}: {answer['error']}")
        return answer

    def _receive(
        self,
        connection: socket.socket,
        progress: SharedProgress,
        size_bytes: int,
        staged: Callable[[], int],
        check: Callable[[], None],
    ) -> bytes:
        received = b""
        seen, moved_at = progress.heartbeats, time.monotonic()
        while not received.endswith(b"\n"):
            if progress.staged < size_bytes:
                progress.staged = staged()
            is_staged = progress.staged >= size_bytes
            connection.settimeout(_POLL_S if is_staged else POLL_INTERVAL_S[progress.urgent])
            try:
                data = connection.recv(1 << 20)
            except TimeoutError:
                check()
                if progress.heartbeats != seen:
                    seen, moved_at = progress.heartbeats, time.monotonic()
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
        if self._connection is None or self._progress is None:
            progress_fd = os.memfd_create("kempnerforge-progress")
            os.ftruncate(progress_fd, PROGRESS_BYTES)
            ours, theirs = socket.socketpair()
            with theirs:
                self._process = subprocess.Popen(
                    command(writer_process.__name__, theirs.fileno(), progress_fd),
                    pass_fds=[theirs.fileno(), progress_fd],
                    stdin=subprocess.DEVNULL,
                )
            log.debug("started writer process %d", self._process.pid)
            self._connection, self._progress = ours, SharedProgress(progress_fd)
            os.close(progress_fd)
        return self._connection, self._progress

    def _kill(self) -> int | None:
        """Kill the process. Return its exit status; None if it hangs in the kernel and is abandoned."""
        process, self._process = self._process, None
        if self._connection is not None:
            self._connection.close()
        self._connection = self._progress = None
        if process is None:
            return None
        log.debug("ending writer process %d", process.pid)
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=1.0)
        return None

    def close(self) -> None:
        """End the process. Call it only when no ``write`` is in progress."""
        self._kill()


def with_backoff(
    work: Callable[[], T],
    *,
    tries: int,
    first_pause_s: float,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Run ``work`` up to ``tries`` times with pauses that double. Raise the last WriterFailedError."""
    pause_s = first_pause_s
    for tries_left in range(tries - 1, -1, -1):
        try:
            return work()
        except WriterFailedError:
            if tries_left == 0:
                raise
            sleep(pause_s)
            pause_s *= 2
    raise AssertionError("tries is at least 1")
