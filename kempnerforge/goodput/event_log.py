"""``ledger.jsonl``: what happened to a run, one JSON object a line, only ever appended to. Rank 0 writes.

Events are described in ``docs/reference/run-folder.md``. A line goes out in one write, so a kill tears at
most the last one; the next writer ends it. ``start``, ``resume``, ``healthy`` and ``end`` are synced to disk;
``progress`` and ``commit`` survive the death of the process, not that of the node, and can be missed without
harm.
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
"""What ``loop`` in ``start`` says of a run without the harness."""
DURABLE = ("start", "resume", "healthy", "end", "unblock")

Event = dict[str, Any]
"""``event`` (its kind), ``attempt``, ``time`` (seconds since the epoch), and what belongs to the kind."""


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
        # A leading newline ends a line that was torn, without a look at the file; readers skip empty lines.
        fd = fsio.open_file(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            fsio.write_all(fd, f"\n{line}\n".encode())
        finally:
            os.close(fd)


def read_events(run_dir: Path) -> list[Event]:
    """All events, oldest first. No ledger is no events. Raises OSError.

    Torn lines are left out, and so are rows that are no events: others may write to the folder too.
    """
    try:
        lines = fsio.read_file(run_dir / LEDGER).split(b"\n")
    except FileNotFoundError:
        return []
    return [event for line in lines if (event := _event(line)) is not None]


def places(events: Sequence[Event]) -> dict[int, dict[str, Any]]:
    """Where each attempt ran: its ``hosts``, each once, and in a SLURM job its id and restart count. Pure."""
    found: dict[int, dict[str, Any]] = {}
    for event in events:
        if event["event"] == "start":
            place: dict[str, Any] = {"hosts": sorted(set(event.get("hosts", ())))}
            if event.get("slurm_job_id"):
                place |= {key: event.get(key) for key in ("slurm_job_id", "slurm_restart_count")}
            found[event["attempt"]] = place
    return found


def saves_s(events: Sequence[Event]) -> list[float]:
    """What the saves took, in seconds, from the call to the commit, oldest first. Pure."""
    return [event["total_s"] for event in events if event["event"] == "commit"]


def _event(line: bytes) -> Event | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and _is_event(found) else None


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
"""What readers rely on; events of other kinds have nothing beside."""
_OPTIONAL = {"hosts": _is_list(_is_text), "spent_s": _is_seconds, "setup_s": _is_seconds}


def _is_event(row: dict[str, Any]) -> bool:
    """Whether a row has what readers of such an event rely on."""
    if not all(name in row and fits(row[name]) for name, fits in _ALL.items()):
        return False
    wanted = _BY_KIND.get(row["event"], {})
    if not all(name in row and fits(row[name]) for name, fits in wanted.items()):
        return False
    return all(fits(row[name]) for name, fits in _OPTIONAL.items() if row.get(name) is not None)
