"""What checkpoints cost the loop: how much longer it takes because of them, not how long a call takes.

A loop goes from step boundary to step boundary, each where all ranks agree. The intervals from the boundary
at which a save begins to the one at which all know its outcome are *beside* it: they hold the time of the
call, the wait before the optimizer, and steps that share processors and memory with the writing. The others
are *quiet*.

    tax of a save = the time of the intervals beside it - their steps x the median of recent quiet steps

Before quiet steps are known, and in the first intervals, where much is done once (compiling, first
allocations), the time that the loop stood still stands in for it: a lower bound. The tax of one save may
come out negative, by noise; it is summed as it is.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from dataclasses import dataclass

WARM_UP_INTERVALS = 3
"""Intervals after the start that are no measure of a quiet step."""
BASELINE_INTERVALS = 5
"""Quiet intervals from which on their median is one."""
QUIET_WINDOW = 33
"""Quiet intervals that the median is over, the newest."""
SAVES_WINDOW = 8
"""Saves that ``cost_s`` is the mean of, the newest."""
SPIKE = 4.0
"""How many times the median a save may count for in the mean."""


@dataclass
class SaveCost:
    """What one save has cost the loop by now."""

    ended_s: float = 0.0
    """In the intervals that have ended."""
    standing_s: float = 0.0
    """The loop stood still for it for so long since the last boundary."""
    blocked_s: float = 0.0
    """The loop stood still for it for so long in all."""
    durable_s: float = 0.0
    """From the call to the commit."""
    is_lower_bound: bool = False
    """Quiet steps were not known in one of the intervals: only standing still was counted there."""

    @property
    def tax_s(self) -> float:
        """Seconds; less than nothing by noise."""
        return self.ended_s + self.standing_s


class OverheadMeter:
    """Sums up the tax of saves, one after the other. Pure: has no clock, is told every duration."""

    def __init__(self) -> None:
        self._quiet: deque[float] = deque(maxlen=QUIET_WINDOW)
        self._saves: deque[SaveCost] = deque(maxlen=SAVES_WINDOW)
        self._intervals = 0
        self._ended_s = 0.0
        self._left_out_s = 0.0
        self._save: SaveCost | None = None
        self.is_pending = self._during_save = False
        """``is_pending``: a save's outcome is not known to all yet."""
        self.tried = False
        """Whether a save began since quiet steps are known."""
        self.waited_s = self.excluded_s = 0.0
        """How long the loop has stood still for saves, and what was left out, in all."""

    def save_begins(self) -> None:
        """In the interval that goes on."""
        self._fold_standing()
        self._save = SaveCost()
        self.is_pending = self._during_save = True
        self.tried |= self.baseline_step_s is not None

    def add_blocking_time(self, seconds: float) -> None:
        """The loop waited for the newest save, in the interval that goes on."""
        self.waited_s += seconds
        if self._save is not None:
            self._during_save = True
            self._save.standing_s += seconds
            self._save.blocked_s += seconds

    def exclude_time(self, seconds: float) -> None:
        """So much of the interval that goes on was no step: a validation, say."""
        self.excluded_s += seconds
        self._left_out_s += seconds

    def step_end(self, steps: int, seconds: float) -> None:
        """An interval of ``steps`` steps has ended that took ``seconds``."""
        self._intervals += steps > 0
        seconds -= self._left_out_s
        if self._during_save and self._save is not None:
            step_s = self.baseline_step_s
            standing_s, self._save.standing_s = self._save.standing_s, 0.0
            self._save.is_lower_bound |= step_s is None
            cost_s = standing_s if step_s is None else seconds - steps * step_s
            self._save.ended_s += cost_s
            self._ended_s += cost_s
        elif steps > 0 and self._intervals > WARM_UP_INTERVALS:
            self._quiet.append(seconds / steps)
        self._left_out_s = 0.0
        self._during_save = self.is_pending

    def save_ended(self, *, durable_s: float, at_boundary: bool) -> SaveCost:
        """All know the outcome of the pending save. ``durable_s`` is 0 for one that failed.

        A save that ends inside an interval goes on to be charged with it: the returned object changes.
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
        """Median of recent quiet steps; None while too few are known."""
        return statistics.median(self._quiet) if len(self._quiet) >= BASELINE_INTERVALS else None

    @property
    def known(self) -> list[SaveCost]:
        """The newest committed saves whose tax is more than a lower bound, oldest first."""
        return [save for save in self._saves if not save.is_lower_bound]

    @property
    def sum_s(self) -> float:
        """The tax of all saves so far, in seconds."""
        return self._ended_s + (self._save.standing_s if self._save is not None else 0.0)

    def _fold_standing(self) -> None:
        """A second save begins in one interval, which can be charged to one of them only: the second."""
        if self._save is not None and self._save.standing_s:
            self._ended_s += self._save.standing_s
            self._left_out_s += self._save.standing_s
            self._save.ended_s += self._save.standing_s
            self._save.standing_s = 0.0


def cost_s(saves: list[SaveCost]) -> float | None:
    """What a save costs the loop: the tax, at least the time of standing still; None without any.

    A mean, because a bound on the share of all time is about means. No save counts for more than ``SPIKE``
    times the median: a file system that fails over for an hour says nothing of what the next save costs.
    """
    if not saves:
        return None
    return max(
        _clipped_mean([save.tax_s for save in saves]), _clipped_mean([save.blocked_s for save in saves])
    )


def _clipped_mean(values: list[float]) -> float:
    most = SPIKE * max(0.0, statistics.median_low(values))
    return statistics.fmean(min(value, most) for value in values)


class StepTimer:
    """A ``OverheadMeter`` and this process's clock; the first rank's is the one that counts."""

    def __init__(self) -> None:
        self.restart(None)

    def restart(self, step: int | None) -> None:
        """The loop begins now, behind ``step``."""
        self.meter = OverheadMeter()
        self._step = step
        self._started = self._boundary = self._saved = self._saved_before = time.perf_counter()
        self._skipped: float | None = None

    def step_end(self, step: int) -> None:
        """The loop is behind ``step``, and all ranks have agreed on what follows."""
        now = time.perf_counter()
        self.meter.step_end(step - (step if self._step is None else self._step), now - self._boundary)
        self._step, self._boundary = step, now

    def save_begins(self) -> None:
        """Now."""
        self._saved_before, self._saved = self._saved, time.perf_counter()
        self.meter.save_begins()

    def skipped(self) -> None:
        """A save was left out."""
        self._skipped = time.perf_counter()

    def save_was_skipped(self) -> None:
        """The save that began was left out after all: the one before is still the last."""
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
        """Seconds since a save was left out; infinite when none was."""
        return float("inf") if self._skipped is None else time.perf_counter() - self._skipped

    @property
    def overhead_pct(self) -> float:
        """The tax of all saves in percent of the time since the loop began; never below 0."""
        return 100 * max(0.0, self.meter.sum_s) / max(self.elapsed_s, 1e-9)
