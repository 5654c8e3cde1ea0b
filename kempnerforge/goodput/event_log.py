"""``ledger.jsonl``: the events of a run, one JSON object per line, append-only. Rank 0 writes it.

``docs/reference/run-folder.md`` describes the events. Each line is one write, so that a kill tears
at most the last line. The next writer ends that line. ``start``, ``resume``, ``healthy``, ``end``
and ``unblock`` are synced to disk. Other events, such as ``progress`` and ``commit``, survive a
kill of the process but not a crash of the node. The loss of such an event does no harm.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kempnerforge import fsio

LEDGER = "ledger.jsonl"
OWN_LOOP = "own"
"""Value of ``loop`` in the ``start`` event of a run with a user's own loop."""
DURABLE = ("start", "resume", "healthy", "end", "unblock")

Event = dict[str, Any]
"""``event`` (its kind), ``attempt``, ``time`` (seconds since the epoch), and the values of the kind."""


class Ledger:
    """Appends events of one attempt to the ledger in ``run_dir``."""

    def __init__(self, run_dir: Path, attempt: int) -> None:
        self.path = run_dir / LEDGER
        self.attempt = attempt

    def write(self, event: str, **values: Any) -> None:
        """Append one event. Raises OSError."""
        self.append(event, self.encode(event, **values))

    def encode(self, event: str, **values: Any) -> str:
        """Return the line of an event that happens now."""
        return json.dumps({"event": event, "attempt": self.attempt, "time": time.time(), **values})

    def append(self, event: str, line: str) -> None:
        """Append the line of an event. Raises OSError."""
        if event in DURABLE:
            fsio.append_line(self.path, line)
            return
        # The leading newline ends a torn line, without reading the file. Readers skip empty lines.
        fd = fsio.open_file(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            fsio.write_all(fd, f"\n{line}\n".encode())
        finally:
            os.close(fd)


def read_events(run_dir: Path) -> list[Event]:
    """Return all events, oldest first; none without a ledger. Raises OSError.

    Skip torn lines, and rows that are not events, because other users may be able to write to the
    folder.
    """
    try:
        lines = fsio.read_file(run_dir / LEDGER).split(b"\n")
    except FileNotFoundError:
        return []
    return [event for line in lines if (event := parse_event(line)) is not None]


def places(events: Sequence[Event]) -> dict[int, dict[str, Any]]:
    """Return where each attempt ran: its unique ``hosts``, and the id and restart count of its SLURM job."""
    by_attempt: dict[int, dict[str, Any]] = {}
    for event in events:
        if event["event"] == "start":
            place: dict[str, Any] = {"hosts": sorted(set(event.get("hosts", ())))}
            if event.get("slurm_job_id"):
                place |= {key: event.get(key) for key in ("slurm_job_id", "slurm_restart_count")}
            by_attempt[event["attempt"]] = place
    return by_attempt


def saves_s(events: Sequence[Event]) -> list[float]:
    """Return the seconds from call to commit of each save, oldest first."""
    return [event["total_s"] for event in events if event["event"] == "commit"]


def parse_event(line: bytes) -> Event | None:
    """Return the event of one line; None for a torn line and for a row that is no event."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and _is_event(row) else None


def _is_step(value: Any) -> bool:
    return type(value) is int


def _is_step_or_none(value: Any) -> bool:
    return value is None or _is_step(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(of, value))


def _is_seconds(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


_ALL = {"event": _is_text, "attempt": _is_step, "time": _is_number}
_BY_KIND: dict[str, dict[str, Callable[[Any], bool]]] = {
    "resume": {"step": _is_step},
    "progress": {"step": _is_step},
    "commit": {"step": _is_step, "total_s": _is_number, "blocking_s": _is_number},
    "skipped": {"step": _is_step},
    "failed": {"step": _is_step},
    "put_off": {"from_step": _is_step, "to_step": _is_step_or_none, "saved_step": _is_step_or_none},
    "deleted": {"steps": _is_list(_is_step), "rules": _is_list(_is_text), "after_commit": _is_step_or_none},
    "end": {"kind": _is_text, "reason": _is_text, "step": _is_step_or_none},
}
"""Required values of each kind of event. Other kinds have none besides those of all events."""
_OPTIONAL = {
    "hosts": _is_list(_is_text),
    "spent_s": _is_seconds,
    "setup_s": _is_seconds,
    "config": _is_table,
    "git": _is_table,
    "layout": _is_table,
    "parameters": _is_number,
    "device": _is_text,
    "version": _is_text,
    "train_samples": _is_step,
}


def _is_event(row: dict[str, Any]) -> bool:
    """Return whether a row has the values that an event of its kind requires."""
    if not all(name in row and fits(row[name]) for name, fits in _ALL.items()):
        return False
    required = _BY_KIND.get(row["event"], {})
    if not all(name in row and fits(row[name]) for name, fits in required.items()):
        return False
    return all(fits(row[name]) for name, fits in _OPTIONAL.items() if row.get(name) is not None)
