"""``stop.request`` in the run's folder: how a batch shell, or a person, asks a run to stop."""

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
    """The file of one run, as rank 0 sees it: by the thread of ``requests``, after ``watch``."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / NAME
        self._file: RequestFile | None = None
        self._is_stale = False
        """Whether there is a request from before the start, which could not be removed."""

    def watch(self, requests: RequestFiles) -> None:
        """Look for the file from now on, once on the calling thread."""
        self._file = requests.watch(NAME, look_now=True)
        if self._is_stale:
            self._file.take()

    def is_there(self) -> bool:
        """Whether the file asks for a stop. Never blocks."""
        return self._file is not None and self._file.is_there

    def consume(self) -> str:
        """Have it removed; returns its first line, the reason, or its name without one. Never blocks."""
        text = self._file.take(unseen=True) if self._file is not None else ""
        return text[:_MAX_REASON] or NAME

    def remove_stale(self, started: float) -> bool:
        """Remove one that was made before ``started``, Unix time; returns whether there was one.

        Ages are compared by the file system's clock, which on a network is another host's: a new file tells
        what it says now.
        """
        try:
            made = self._path.lstat().st_mtime
        except OSError:
            return False
        if made >= started + self._ahead_s():
            return False
        try:
            self._path.unlink(missing_ok=True)
        except OSError:  # the thread that looks for it tries again, and reports it
            self._is_stale = True
        return True

    def _ahead_s(self) -> float:
        """By how much the file system's clock is ahead of this host's; 0 where no file can be made."""
        probe = self._path.with_name(f".{NAME}.{os.getpid()}")
        ahead_s = 0.0
        with contextlib.suppress(OSError):
            os.close(fsio.open_file(probe, os.O_WRONLY | os.O_TRUNC))
            ahead_s = probe.stat().st_mtime - time.time()
            probe.unlink()
        return ahead_s
