"""Where a rank stands: written by the main thread at no cost, read by the one that watches for hangs."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

ACTIVITIES = ("setup", "step", "eval", "agree", "save")
"""In their order within a step."""
PHASES = ("", "step", "data", "forward_backward", "staging", "optimizer")
"""Of a step, in their order; any other comes last."""
RECENT = 100


@dataclass(frozen=True)
class Place:
    """What a rank is doing."""

    activity: str
    step: int
    phase: str = ""
    began: float = 0.0
    """When the activity began, by this rank's monotonic clock."""
    collectives: int = 0
    """How many this rank had issued by then."""

    @property
    def order(self) -> tuple[int, int, int]:
        """Ranks with a smaller one have come less far."""
        phase = PHASES.index(self.phase) if self.phase in PHASES else len(PHASES)
        return (self.step, ACTIVITIES.index(self.activity), phase)

    def __str__(self) -> str:
        phase = f", {self.phase}" if self.phase else ""
        return f"{self.activity} {self.step}{phase}" if self.activity != "setup" else "set-up"


class Progress:
    """The place of this rank, and how long activities took.

    ``place`` is replaced as a whole, so another thread never sees half of one.

    Args:
        collectives: how many this rank has issued so far.
    """

    def __init__(self, collectives: Callable[[], int] = lambda: 0) -> None:
        self.collectives = collectives
        self.place = Place("setup", 0, began=time.monotonic())
        self.collectives_per_step = 0
        """In the last whole step; 0 before there was one."""
        self._step_started_at = -1
        self._took_s: dict[str, deque[float]] = {name: deque(maxlen=RECENT) for name in ACTIVITIES}

    def begin(self, activity: str, step: int) -> None:
        """One of ``ACTIVITIES`` begins, of or after ``step``; the one before is over."""
        now, issued, before = time.monotonic(), self.collectives(), self.place
        self._took_s[before.activity].append(now - before.began)
        if activity == "step":
            if self._step_started_at >= 0:
                self.collectives_per_step = issued - self._step_started_at
            self._step_started_at = issued
        self.place = Place(activity, step, began=now, collectives=issued)

    def phase(self, name: str) -> None:
        """A phase of the activity begins."""
        self.place = replace(self.place, phase=name)

    def saved(self, seconds: float) -> None:
        """A save took so long from the call to the commit, most of it in the background perhaps."""
        self._took_s["save"].append(seconds)

    def took_s(self, activity: str) -> list[float]:
        """Seconds of the last ones. Waiting for the others to agree may take what a step takes."""
        return list(self._took_s["step" if activity == "agree" else activity])


def limit_s(took_s: Sequence[float], *, multiple: float, floor_s: float, ceiling_s: float) -> float:
    """From when on something is too long: ``multiple`` times its median, in seconds.

    ``floor_s`` at least. ``ceiling_s`` at most, and where nothing has been measured yet: then the process
    groups' own timeout is near, which ends the process without saying where it stood.
    """
    if not took_s:
        return max(ceiling_s, floor_s)
    return max(floor_s, min(multiple * statistics.median(took_s), ceiling_s))
