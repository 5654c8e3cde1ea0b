"""The history of each attempt of a run, derived from the ledger and the recorded faults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kempnerforge.goodput.event_log import OWN_LOOP, Event, read_events
from kempnerforge.goodput.faults import FaultRecord, read_faults

KINDS = ("finished", "stopped", "deadline", "config", "fault", "lost", "blocked")
"""``lost``: ended without a record, by SIGKILL or with its node, or because another rank ended so."""


@dataclass
class AttemptHistory:
    """One attempt."""

    number: int
    start: Event | None = None
    resume: Event | None = None
    end: Event | None = None
    progress: list[Event] = field(default_factory=list)
    commits: list[Event] = field(default_factory=list)
    healthy: bool = False
    """Whether it completed enough steps for the checkpoint that it started from to be trusted."""
    acknowledged: bool = False
    """Whether a user confirmed afterwards, by ``unblock`` or a rollback, that the cause is fixed."""
    last_seen: float = 0.0
    """Time of its last event."""
    cause: FaultRecord | None = None
    """The earliest recorded fault that is not a consequence of the loss of another rank."""
    is_last: bool = False

    @property
    def began_at(self) -> int | None:
        """The step that it resumed from; None if it ended before it resumed."""
        return self.resume["step"] if self.resume else None

    @property
    def is_own_loop(self) -> bool:
        """Whether it ran a user's own loop instead of the harness."""
        return self.start is not None and self.start.get("loop") == OWN_LOOP

    @property
    def last_step(self) -> int:
        """The last step that it is known to have completed."""
        steps = [event["step"] for event in (self.resume, *self.progress, self.end) if event]
        return max((step for step in steps if step is not None), default=0)

    @property
    def kind(self) -> str:
        """One of ``KINDS``. An attempt without an end is lost, or still running."""
        recorded = self.end["kind"] if self.end else "lost"
        return "fault" if recorded == "lost" and self.cause is not None else recorded

    @property
    def error_type(self) -> str:
        """Class of the error that ended it; empty if there was none or it is unknown."""
        if self.kind == "fault" and self.cause is not None:
            return self.cause.type_name
        return str(self.end.get("error") or "") if self.end else ""

    @property
    def reason(self) -> str:
        """Why it ended, as text."""
        if self.kind == "fault" and self.cause is not None:
            fault = self.cause
            return f"rank {fault.rank} on {fault.host}: {fault.text} (see {fault.path})"
        return str(self.end["reason"]) if self.end else "no end was recorded: killed, or its node was lost"


def read_history(run_dir: Path, *, rollbacks: Sequence[int] = ()) -> list[AttemptHistory]:
    """Return all attempts of a run. ``rollbacks`` are attempt numbers. Raises OSError."""
    return derive(read_events(run_dir), read_faults(run_dir), rollbacks=rollbacks)


def last_step_done(history: Sequence[AttemptHistory], rollbacks: Sequence[tuple[int, int]] = ()) -> int:
    """Return the last step of the newest attempt that trained; 0 if none did.

    ``rollbacks`` has the attempt and the step of each rollback. Steps that a rollback discarded do
    not count, because they were given up deliberately.
    """
    for attempt in reversed(history):
        if attempt.resume is not None:
            done = max([attempt.last_step, *(event["step"] for event in attempt.commits)])
            return min([done, *(step for number, step in rollbacks if number > attempt.number)])
    return 0


def derive(
    events: Sequence[Event], faults: Sequence[FaultRecord], *, rollbacks: Sequence[int] = ()
) -> list[AttemptHistory]:
    """Build the history from events and faults. See ``read_history``."""
    by_number: dict[int, AttemptHistory] = {}
    acknowledged = max(rollbacks, default=0)
    for event in events:
        if event["event"] == "unblock":
            acknowledged = max(acknowledged, event["attempt"])
            continue
        attempt = by_number.setdefault(event["attempt"], AttemptHistory(event["attempt"]))
        attempt.last_seen = max(attempt.last_seen, event["time"])
        if event["event"] in ("start", "resume", "end"):
            setattr(attempt, event["event"], event)
        elif event["event"] == "progress":
            attempt.progress.append(event)
        elif event["event"] == "commit":
            attempt.commits.append(event)
        elif event["event"] == "healthy":
            attempt.healthy = True
    for fault in faults:
        attempt = by_number.get(fault.attempt)
        if attempt is not None and attempt.cause is None and not fault.by_peer:
            attempt.cause = fault
    history = [by_number[number] for number in sorted(by_number)]
    for attempt in history:
        attempt.acknowledged = attempt.number <= acknowledged
        attempt.is_last = attempt is history[-1]
    return history
