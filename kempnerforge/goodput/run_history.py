"""What a start reads of the earlier attempts of its run."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kempnerforge import fsio
from kempnerforge.goodput import crash_loop_guard
from kempnerforge.goodput.event_log import Event, parse_event, read_events
from kempnerforge.goodput.faults import read_faults
from kempnerforge.goodput.history import AttemptHistory, derive, last_step_done

METRICS = "metrics.jsonl"


class RunHistory:
    """The records of a run in ``run_dir``, for the process that holds its lease.

    The ledger is read once, at the first use. So all readers get the events that were on disk then,
    and those that this attempt has added with ``append``. A reader that needs the attempt's own
    ``start`` event, such as the automatic interval, must come after ``append``. The others get the
    same result with it and without it.

    Args:
        run_dir: the run's folder.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._events: list[Event] | None = None

    def events(self) -> list[Event]:
        """Return the events of the ledger, oldest first. Raises OSError."""
        if self._events is None:
            self._events = read_events(self.run_dir)
        return self._events

    def append(self, line: str) -> None:
        """Add an event that this attempt has written to the ledger, unless a later read will find it."""
        event = parse_event(line.encode())
        if self._events is not None and event is not None:
            self._events.append(event)

    def forget(self) -> None:
        """Free the events, of which a long run has many. The next use reads them again."""
        self._events = None

    def attempts(self, rollbacks: Sequence[tuple[int, int]] = ()) -> list[AttemptHistory]:
        """Return all attempts. ``rollbacks`` has attempt and step of each rollback. Raises OSError."""
        faults = read_faults(self.run_dir)
        return derive(self.events(), faults, rollbacks=[attempt for attempt, _ in rollbacks])

    def suspects(self, rollbacks: Sequence[tuple[int, int]] = ()) -> dict[int, str]:
        """Return steps that a resume must not use, with reasons (``crash_loop_guard``). Raises OSError."""
        return crash_loop_guard.suspects(self.attempts(rollbacks))

    def last_done_step(self, rollbacks: Sequence[tuple[int, int]] = ()) -> int:
        """Return the last step that an earlier attempt is known to have done, if it still counts.

        For a user's own loop, this is read from the ledger. For ``scripts/train.py``, it is read
        from ``metrics.jsonl``, which has a row for each logged step. Raises OSError.
        """
        history = derive(self.events(), ())
        newest = next((attempt for attempt in reversed(history) if attempt.resume is not None), None)
        if newest is not None and newest.is_own_loop:
            return last_step_done(history, rollbacks)
        return last_logged_step(self.run_dir, rollbacks)


def last_logged_step(run_dir: Path, rollbacks: Sequence[tuple[int, int]] = ()) -> int:
    """Return the step of the last complete training row in ``metrics.jsonl`` that counts; 0 if there is none.

    After a rollback, rows of older attempts count only up to the step of the rollback, because the
    later steps were given up on purpose. Reads only the end of the file, which may be large. Raises
    OSError.
    """
    try:
        with os.fdopen(fsio.open_to_read(run_dir / METRICS), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - (1 << 20)))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        row = _training_row(line)
        if row is not None:
            later = [step for attempt, step in rollbacks if attempt > row.get("attempt", 0)]
            return min([row["step"], *later])
    return 0


def _training_row(line: bytes) -> dict[str, Any] | None:
    """Parse one line of metrics. Return None for a torn line and for a row of something else."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or "train/loss" not in row:
        return None
    return row if all(type(row.get(key, 0)) is int for key in ("step", "attempt")) and "step" in row else None
