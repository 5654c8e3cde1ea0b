"""The progress of a rank: written by the main thread at no cost, read by the hang detector's thread."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

ACTIVITIES = ("setup", "step", "hooks", "eval", "agree", "save")
"""Activities, in their order within a step."""
PHASES = ("", "step", "data", "forward_backward", "staging", "optimizer")
"""Phases of a step, in order. Any other phase is last."""
RECENT = 100


@dataclass(frozen=True)
class Position:
    """What a rank is doing."""

    activity: str
    step: int
    phase: str = ""
    began: float = 0.0
    """When the activity began, by this rank's monotonic clock."""
    collectives: int = 0
    """How many collectives this rank had issued when the activity began."""

    @property
    def order(self) -> tuple[int, int, int]:
        """A sort key: ranks with a smaller key are less advanced."""
        phase = PHASES.index(self.phase) if self.phase in PHASES else len(PHASES)
        return (self.step, ACTIVITIES.index(self.activity), phase)

    def __str__(self) -> str:
        phase = f", {self.phase}" if self.phase else ""
        return f"{self.activity} {self.step}{phase}" if self.activity != "setup" else "set-up"


class Progress:
    """The position of this rank, and how long activities took.

    ``position`` is replaced as a whole, so that another thread never sees a partial update.

    Args:
        collectives: returns how many collectives this rank has issued so far.
    """

    def __init__(self, collectives: Callable[[], int] = lambda: 0) -> None:
        self.collectives = collectives
        self.position = Position("setup", 0, began=time.monotonic())
        self.collectives_per_step = 0
        """Collectives of the last complete step; 0 before the first."""
        self._step_started_at = -1
        self._took_s: dict[str, deque[float]] = {name: deque(maxlen=RECENT) for name in ACTIVITIES}

    def begin(self, activity: str, step: int) -> None:
        """Begin one of ``ACTIVITIES``, in or after ``step``, and end the previous one."""
        now, issued, before = time.monotonic(), self.collectives(), self.position
        self._took_s[before.activity].append(now - before.began)
        if activity == "step":
            if self._step_started_at >= 0:
                self.collectives_per_step = issued - self._step_started_at
            self._step_started_at = issued
        self.position = Position(activity, step, began=now, collectives=issued)

    def phase(self, name: str) -> None:
        """Begin a phase of the activity."""
        self.position = replace(self.position, phase=name)

    def saved(self, seconds: float) -> None:
        """Record how long a save took from the call to the commit, including work in the background."""
        self._took_s["save"].append(seconds)

    def took_s(self, activity: str) -> list[float]:
        """Return the last durations of ``activity``.

        For "agree", return those of steps: an agreement waits for the steps of other ranks.
        """
        return list(self._took_s["step" if activity == "agree" else activity])


def limit_s(took_s: Sequence[float], *, multiple: float, floor_s: float, ceiling_s: float) -> float:
    """Return the duration in seconds beyond which an activity is late: ``multiple`` times its median.

    The limit is at least ``floor_s`` and at most ``ceiling_s``. Without measurements it is
    ``ceiling_s``: soon after that, the time-out of the process groups would end the process without
    a report of its position.
    """
    if not took_s:
        return max(ceiling_s, floor_s)
    return max(floor_s, min(multiple * statistics.median(took_s), ceiling_s))
