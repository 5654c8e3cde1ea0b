"""``stop.request`` in the run's folder: how a batch shell, or a person, asks a run to stop."""

from __future__ import annotations

import os
import time
from pathlib import Path

from kempnerforge import fsio

NAME = "stop.request"
_LOOK_EVERY_S = 1.0
_MAX_REASON = 200


class StopFile:
    """The file of one run, as rank 0 sees it."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / NAME
        self._looked_at = float("-inf")

    def is_there(self) -> bool:
        """Looks once a second at most: a look is a round trip on a shared file system."""
        now = time.monotonic()
        if now - self._looked_at < _LOOK_EVERY_S:
            return False
        self._looked_at = now
        return self._path.exists()

    def consume(self) -> str:
        """Remove it; returns its first line, the reason, or its name when it is empty or gone."""
        try:
            text = self._path.read_text(errors="replace").strip()
        except FileNotFoundError:
            return NAME
        self._path.unlink(missing_ok=True)
        return text.splitlines()[0][:_MAX_REASON] if text else NAME

    def remove_stale(self, started: float) -> bool:
        """Remove one that was made before ``started``, Unix time; returns whether there was one.

        Ages are compared by the file system's clock, which on a network is another host's: a new file tells
        what it says now.
        """
        probe = self._path.with_name(f".{NAME}.{os.getpid()}")
        try:
            made = self._path.stat().st_mtime
            os.close(fsio.open_file(probe, os.O_WRONLY | os.O_TRUNC))
            ahead_s = probe.stat().st_mtime - time.time()
            probe.unlink()
        except FileNotFoundError:
            return False
        if made >= started + ahead_s:
            return False
        self._path.unlink(missing_ok=True)
        return True
