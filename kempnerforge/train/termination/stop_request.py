"""``stop.request`` in the run's folder: the file with which a batch script or a user requests a stop."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from kempnerforge import fsio
from kempnerforge.checkpoint.run.request_files import RequestFile, RequestFiles

NAME = "stop.request"
_MAX_REASON = 200


class StopFile:
    """The stop request of one run, on rank 0. After ``watch`` the thread of ``requests`` polls for it."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / NAME
        self._file: RequestFile | None = None
        self._is_stale = False
        """Whether a request from before the start exists and could not be removed."""

    def watch(self, requests: RequestFiles) -> None:
        """Begin to poll for the file. The first check is in the calling thread."""
        self._file = requests.watch(NAME, look_now=True)
        if self._is_stale:
            self._file.take()

    def is_there(self) -> bool:
        """Whether the file exists and requests a stop. Never blocks."""
        return self._file is not None and self._file.is_there

    def consume(self) -> str:
        """Have the file removed. Return its first line, the reason, or its name without one. Never blocks."""
        text = self._file.take(unseen=True) if self._file is not None else ""
        return text[:_MAX_REASON] or NAME

    def remove_stale(self, started: float) -> bool:
        """Remove a request from before ``started``, Unix time. Return whether there was one.

        The age is measured by the clock of the file system. On a network this is the clock of
        another host, and it is read from the time of a new file.
        """
        try:
            made = self._path.lstat().st_mtime
        except OSError:
            return False
        if made >= started + self._ahead_s():
            return False
        try:
            self._path.unlink(missing_ok=True)
        except OSError:  # the polling thread tries again and reports it
            self._is_stale = True
        return True

    def _ahead_s(self) -> float:
        """Return how far the file system's clock is ahead of this host's; 0 if no file can be created."""
        probe = self._path.with_name(f".{NAME}.{os.getpid()}")
        ahead_s = 0.0
        with contextlib.suppress(OSError):
            os.close(fsio.open_file(probe, os.O_WRONLY | os.O_TRUNC))
            ahead_s = probe.stat().st_mtime - time.time()
            probe.unlink()
        return ahead_s
