"""How each attempt of a run went, derived from the ledger and the recorded faults. Nothing else is stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kempnerforge.goodput.event_log import OWN_LOOP, Event, read_events
from kempnerforge.goodput.faults import FaultRecord, read_faults

KINDS = ("finished", "stopped", "deadline", "config", "fault", "lost", "blocked")
"""``lost``: ended without a word, by SIGKILL or with its node, or because of a rank that did."""


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
    """Whether it did enough steps for the checkpoint that it began from to be trusted."""
    acknowledged: bool = False
    """Whether a user has said since, by ``unblock`` or a rollback, that the cause is seen to."""
    last_seen: float = 0.0
    """Time of its last event."""
    cause: FaultRecord | None = None
    """The earliest recorded fault that is no consequence of another rank's end."""
    is_last: bool = False

    @property
    def began_at(self) -> int | None:
        """The step that it went on from; None when it did not get that far."""
        return self.resume["step"] if self.resume else None

    @property
    def is_own_loop(self) -> bool:
        """Whether the loop was a user's own, and not the harness."""
        return self.start is not None and self.start.get("loop") == OWN_LOOP

    @property
    def last_step(self) -> int:
        """The last step that it is known to have done."""
        steps = [event["step"] for event in (self.resume, *self.progress, self.end) if event]
        return max((step for step in steps if step is not None), default=0)

    @property
    def kind(self) -> str:
        """One of ``KINDS``. An attempt without an end is lost, or it is running."""
        told = self.end["kind"] if self.end else "lost"
        return "fault" if told == "lost" and self.cause is not None else told

    @property
    def error_type(self) -> str:
        """Class of the error that ended it; empty if none did or it is not known."""
        if self.kind == "fault" and self.cause is not None:
            return self.cause.type_name
        return str(self.end.get("error") or "") if self.end else ""

    @property
    def reason(self) -> str:
        """Why it ended, in words."""
        if self.kind == "fault" and self.cause is not None:
            one = self.cause
            return f"rank {one.rank} on {one.host}: {one.text} (see {one.path})"
        return str(self.end["reason"]) if self.end else "no end was written: killed, or its node was lost"


def read_history(run_dir: Path, *, rollbacks: Sequence[int] = ()) -> list[AttemptHistory]:
    """All attempts of a run. ``rollbacks``: their attempt numbers. Raises OSError."""
    return derive(read_events(run_dir), read_faults(run_dir), rollbacks=rollbacks)


def last_step_done(history: Sequence[AttemptHistory], rollbacks: Sequence[tuple[int, int]] = ()) -> int:
    """Return the last step of the newest attempt that trained, as far as it counts; 0 when none did.

    ``rollbacks``: attempt and step of each. What one took back was given up on purpose.
    """
    for one in reversed(history):
        if one.resume is not None:
            done = max([one.last_step, *(event["step"] for event in one.commits)])
            return min([done, *(step for attempt, step in rollbacks if attempt > one.number)])
    return 0


def derive(
    events: Sequence[Event], faults: Sequence[FaultRecord], *, rollbacks: Sequence[int] = ()
) -> list[AttemptHistory]:
    """The same, from what was read. Pure."""
    found: dict[int, AttemptHistory] = {}
    acknowledged = max(rollbacks, default=0)
    for event in events:
        if event["event"] == "unblock":
            acknowledged = max(acknowledged, event["attempt"])
            continue
        one = found.setdefault(event["attempt"], AttemptHistory(event["attempt"]))
        one.last_seen = max(one.last_seen, event["time"])
        if event["event"] in ("start", "resume", "end"):
            setattr(one, event["event"], event)
        elif event["event"] == "progress":
            one.progress.append(event)
        elif event["event"] == "commit":
            one.commits.append(event)
        elif event["event"] == "healthy":
            one.healthy = True
    for fault in faults:
        one = found.get(fault.attempt)
        if one is not None and one.cause is None and not fault.by_peer:
            one.cause = fault
    history = [found[number] for number in sorted(found)]
    for one in history:
        one.acknowledged = one.number <= acknowledged
        one.is_last = one is history[-1]
    return history
