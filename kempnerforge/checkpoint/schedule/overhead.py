"""Measure what saves cost the training loop: by how much they lengthen it, not how long a call takes.

The loop has step boundaries, at which all ranks agree. Time between two boundaries is an interval.
The intervals from the boundary at which a save begins to the one at which all ranks know its
outcome are *during* the save. They contain the call, the wait before the optimizer step, and steps
that share processors and memory with the writer. The other intervals are *baseline* intervals.

    cost of a save = time of the intervals during it - their steps x median of recent baseline steps

Until there is a baseline, only the time that the loop was blocked counts, which is a lower bound.
The first intervals are not part of the baseline, because they contain one-time work (compilation,
first allocations). Noise can make the cost of a save negative. Negative costs are summed up
unchanged.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from dataclasses import dataclass

WARM_UP_INTERVALS = 3
"""Number of intervals after the start that are left out of the baseline."""
BASELINE_INTERVALS = 5
"""Least number of baseline intervals for a median."""
BASELINE_WINDOW = 33
"""Number of newest baseline intervals whose median is used."""
SAVES_WINDOW = 8
"""Number of newest saves that ``cost_s`` averages."""
SPIKE = 4.0
"""In the mean, a save counts for at most this many times the median."""


@dataclass
class SaveCost:
    """The cost of one save so far."""

    ended_s: float = 0.0
    """Seconds of cost in the intervals that have ended."""
    blocked_now_s: float = 0.0
    """Seconds that the save has blocked the loop since the last boundary."""
    blocked_s: float = 0.0
    """Seconds that the save has blocked the loop in all."""
    durable_s: float = 0.0
    """Seconds from the call to the commit; 0 for a save that failed."""
    is_lower_bound: bool = False
    """Whether only blocking time was counted in an interval, for lack of a baseline."""

    @property
    def overhead_s(self) -> float:
        """The cost in seconds. Noise can make it negative."""
        return self.ended_s + self.blocked_now_s


class OverheadMeter:
    """Sums up the cost of saves, one after the other. Reads no clock: its methods take durations."""

    def __init__(self) -> None:
        self._baseline: deque[float] = deque(maxlen=BASELINE_WINDOW)
        self._saves: deque[SaveCost] = deque(maxlen=SAVES_WINDOW)
        self._intervals = 0
        self._ended_s = 0.0
        self._excluded_now_s = 0.0
        self._save: SaveCost | None = None
        self.is_pending = self._during_save = False
        """``is_pending``: whether the outcome of a save is still unknown to some rank."""
        self.tried = False
        """Whether a save has begun since the baseline exists."""
        self.waited_s = self.excluded_s = 0.0
        """Seconds that saves have blocked the loop, and seconds that were excluded, in all."""

    def save_begins(self) -> None:
        """Record that a save begins in the current interval."""
        self._close_account()
        self._save = SaveCost()
        self.is_pending = self._during_save = True
        self.tried |= self.baseline_step_s is not None

    def add_blocking_time(self, seconds: float) -> None:
        """Add seconds that the loop waited for the newest save, in the current interval."""
        self.waited_s += seconds
        if self._save is not None:
            self._during_save = True
            self._save.blocked_now_s += seconds
            self._save.blocked_s += seconds

    def exclude_time(self, seconds: float) -> None:
        """Exclude seconds of the current interval that were not spent in steps, such as a validation."""
        self.excluded_s += seconds
        self._excluded_now_s += seconds

    def step_end(self, steps: int, seconds: float) -> None:
        """End the current interval, which had ``steps`` steps and took ``seconds``."""
        self._intervals += steps > 0
        seconds -= self._excluded_now_s
        if self._during_save and self._save is not None:
            step_s = self.baseline_step_s
            blocked_now_s, self._save.blocked_now_s = self._save.blocked_now_s, 0.0
            self._save.is_lower_bound |= step_s is None
            cost_s = blocked_now_s if step_s is None else seconds - steps * step_s
            self._save.ended_s += cost_s
            self._ended_s += cost_s
        elif steps > 0 and self._intervals > WARM_UP_INTERVALS:
            self._baseline.append(seconds / steps)
        self._excluded_now_s = 0.0
        self._during_save = self.is_pending

    def save_ended(self, *, durable_s: float, at_boundary: bool) -> SaveCost:
        """Record that all ranks know the outcome of the pending save. ``durable_s``: 0 if it failed.

        If the save ends inside an interval, the whole interval counts as its cost, so the returned
        object still changes.
        """
        assert self._save is not None
        self.is_pending = False
        if at_boundary:
            self._during_save = False
        save = self._save
        save.is_lower_bound |= self.baseline_step_s is None
        save.durable_s = durable_s
        if durable_s:
            self._saves.append(save)
        return save

    @property
    def baseline_step_s(self) -> float | None:
        """Median seconds of recent baseline steps; None while there are too few."""
        return statistics.median(self._baseline) if len(self._baseline) >= BASELINE_INTERVALS else None

    @property
    def measured(self) -> list[SaveCost]:
        """The newest committed saves whose cost is not only a lower bound, oldest first."""
        return [save for save in self._saves if not save.is_lower_bound]

    @property
    def sum_s(self) -> float:
        """The cost of all saves so far, in seconds."""
        return self._ended_s + (self._save.blocked_now_s if self._save is not None else 0.0)

    def _close_account(self) -> None:
        """If another save begins in the same interval, count only blocking time for the first one."""
        if self._save is not None and self._save.blocked_now_s:
            self._ended_s += self._save.blocked_now_s
            self._excluded_now_s += self._save.blocked_now_s
            self._save.ended_s += self._save.blocked_now_s
            self._save.blocked_now_s = 0.0


def cost_s(saves: list[SaveCost]) -> float | None:
    """Return the mean cost of ``saves``, at least their mean blocking time; None without saves.

    The mean is used because ``max_overhead_pct`` limits the share of the total time. No save counts
    for more than ``SPIKE`` times the median: a file system that was down for an hour does not
    predict the cost of the next save.
    """
    if not saves:
        return None
    return max(
        _clipped_mean([save.overhead_s for save in saves]), _clipped_mean([save.blocked_s for save in saves])
    )


def _clipped_mean(values: list[float]) -> float:
    most = SPIKE * max(0.0, statistics.median_low(values))
    return statistics.fmean(min(value, most) for value in values)


class StepTimer:
    """An ``OverheadMeter`` with this process's clock. Decisions use the first rank's clock."""

    def __init__(self) -> None:
        self.restart(None)

    def restart(self, step: int | None) -> None:
        """Record that the loop begins now, after ``step``."""
        self.meter = OverheadMeter()
        self._step = step
        self._started = self._boundary = self._saved = self._saved_before = time.perf_counter()
        self._skipped: float | None = None

    def step_end(self, step: int) -> None:
        """Record that ``step`` has ended and all ranks have agreed on what follows."""
        now = time.perf_counter()
        self.meter.step_end(step - (step if self._step is None else self._step), now - self._boundary)
        self._step, self._boundary = step, now

    def save_begins(self) -> None:
        """Record that a save begins now."""
        self._saved_before, self._saved = self._saved, time.perf_counter()
        self.meter.save_begins()

    def skipped(self) -> None:
        """Record that a save was skipped."""
        self._skipped = time.perf_counter()

    def save_was_skipped(self) -> None:
        """Record that the save that began was skipped. The one before it counts as the last save again."""
        self._saved = self._saved_before
        self.skipped()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the loop began."""
        return time.perf_counter() - self._started

    @property
    def since_save_s(self) -> float:
        """Seconds since the last save began, or since the loop did."""
        return time.perf_counter() - self._saved

    @property
    def since_skip_s(self) -> float:
        """Seconds since a save was skipped; infinite if none was."""
        return float("inf") if self._skipped is None else time.perf_counter() - self._skipped

    @property
    def overhead_pct(self) -> float:
        """The cost of all saves in percent of the time since the loop began, at least 0."""
        return 100 * max(0.0, self.meter.sum_s) / max(self.elapsed_s, 1e-9)
