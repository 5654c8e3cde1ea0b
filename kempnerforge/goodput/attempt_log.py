"""Record an attempt in the ledger: its setup, its progress, and how it spends its time."""

from __future__ import annotations

import errno
import logging
import time
from pathlib import Path
from typing import Any

from kempnerforge.errors import (
    EXIT_BAD_CONFIG,
    EXIT_FINISHED,
    EXIT_NO_PROGRESS,
    EXIT_STOPPED,
)
from kempnerforge.goodput import crash_loop_guard
from kempnerforge.goodput.event_log import Ledger
from kempnerforge.goodput.faults import is_peer_loss
from kempnerforge.log_setup import THIS_RANK
from kempnerforge.write_behind import WriteBehind

log = logging.getLogger(__name__)

END_WAIT_S = 5.0
_SPACING = 0.02
_MIN_SPACING_S, _MAX_SPACING_S = 0.05, 10.0


class AttemptLog:
    """Measures the setup and the loop of one attempt, and writes both to the ledger.

    Nothing is written before ``open``, which only rank 0 calls. Events of the loop are written on a
    thread (``write_behind``), so that training does not wait for a slow file system. If the ledger
    cannot be written, the run continues and one warning is logged.

    Args:
        started: start of the attempt in seconds since the epoch.
        first_part: the phase of the setup that took the time from ``started`` until now.
    """

    def __init__(self, started: float, *, first_part: str) -> None:
        self.started = started
        self._lap = time.perf_counter()
        self._setup_s: dict[str, float] = {first_part: max(0.0, time.time() - started)}
        self._spent_s: dict[str, float] = {}
        self._ledger: Ledger | None = None
        self._healthy_from: tuple[int, int] | None = None
        self._loop_began = self._last_progress = 0.0
        self._has_warned = False
        self._queue = WriteBehind("ledger", failed=self._failed)

    def end_phase(self, part: str) -> None:
        """Add the time since the last call to ``part`` of the setup."""
        now = time.perf_counter()
        self._setup_s[part] = self._setup_s.get(part, 0.0) + now - self._lap
        self._lap = now

    def open(self, run_dir: Path, attempt: int) -> None:
        """Write to the ledger in ``run_dir`` from now on."""
        self._ledger = Ledger(run_dir, attempt)

    def start(self, facts: dict[str, Any]) -> str:
        """Record the start of the attempt durably. Return the line in the ledger."""
        return self.write("start", process_started=self.started, **facts)

    def resumed(
        self, *, step: int, skipped: int, source: str, lost_steps: int, load_s: float, **facts: Any
    ) -> None:
        """Record that the state is loaded and the loop starts. ``skipped`` counts non-finite steps."""
        self.end_phase("resume")
        self._healthy_from = (step, skipped)
        self._loop_began = self._last_progress = time.perf_counter()
        loaded = {"step": step, "source": source, "lost_steps": lost_steps, "load_s": load_s}
        self.write("resume", **loaded, setup_s=self._setup_s, **facts)
        self.flush()

    def stepped(self, step: int, skipped: int) -> None:
        """Record the events due after a step. Progress may lag by 2% of the attempt, at most 10 s."""
        if self._healthy_from is not None:
            began, before = self._healthy_from
            if step - began - (skipped - before) >= crash_loop_guard.HEALTHY_STEPS:
                self._healthy_from = None
                self.write("healthy", step=step)
        now = time.perf_counter()
        pause_s = min(max(_SPACING * (now - self._loop_began), _MIN_SPACING_S), _MAX_SPACING_S)
        if now - self._last_progress >= pause_s:
            self._last_progress = now
            self.write("progress", step=step, spent_s=self._spent_s)

    def spent(self, part: str, seconds: float) -> None:
        """Add time of the loop to ``part``: step, data or eval."""
        self._spent_s[part] = self._spent_s.get(part, 0.0) + seconds

    def end(
        self, *, kind: str, status: int, reason: str, step: int | None, error: BaseException | None = None
    ) -> None:
        """Record the end of the attempt durably. ``kind`` is one of ``history.KINDS``.

        Block for ``END_WAIT_S`` at most. Events that are not written by then are lost, with a
        warning.
        """
        name = type(error).__name__ if error is not None else None
        self.write(
            "end", kind=kind, status=status, reason=reason, error=name, step=step, spent_s=self._spent_s
        )
        if left := self._queue.flush(END_WAIT_S):
            text = f"{left} events, including the end, were not written within {END_WAIT_S:g} s"
            self.warn(OSError(errno.ETIMEDOUT, text))

    def write(self, event: str, **values: Any) -> str:
        """Queue an event for the ledger, if it is open. Return its line."""
        ledger = self._ledger
        if ledger is None:
            return ""
        line = ledger.encode(event, **values)
        if not self._queue.submit(lambda: ledger.append(event, line)):
            self.warn(OSError(errno.ETIMEDOUT, "too many events are waiting for a slow file system"))
        return line

    def flush(self) -> None:
        """Wait until all events are written. Do not call this in the loop."""
        self._queue.flush(None)

    def _failed(self, error: Exception) -> None:
        self.warn(error if isinstance(error, OSError) else OSError(errno.EIO, str(error)))

    def warn(self, error: OSError) -> None:
        """Log that the record is incomplete, once."""
        if not self._has_warned:
            self._has_warned = True
            log.warning("the record of this attempt is not complete: %s", error, extra=THIS_RANK)


def end_kind(status: int, reason: str, error: BaseException | None) -> str:
    """Return the kind of an end, one of ``goodput.history.KINDS``."""
    if error is not None and is_peer_loss(type(error).__name__, str(error)):
        return "lost"
    if status == EXIT_STOPPED:
        return "deadline" if "deadline" in reason else "stopped"
    kinds = {EXIT_FINISHED: "finished", EXIT_BAD_CONFIG: "config", EXIT_NO_PROGRESS: "blocked"}
    return kinds.get(status, "fault")
