"""Control the time between saves under ``interval``, ``interval_minutes`` and ``interval = "auto"``.

``save_intervals`` is a pure function of measurements. ``SaveIntervalController`` calls it on the
first rank and applies hysteresis. The result reaches all ranks in the one agreement of each step.
See docs/guide/interval.md.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kempnerforge.checkpoint.results import SaveReport
from kempnerforge.checkpoint.run import lineage
from kempnerforge.checkpoint.schedule.overhead import SAVES_WINDOW, SaveCost, StepTimer, cost_s
from kempnerforge.config.schema import CheckpointConfig
from kempnerforge.goodput.accounting import interruptions
from kempnerforge.goodput.history import AttemptHistory
from kempnerforge.goodput.interval import daly, expected_mtti, prior_mtti
from kempnerforge.goodput.run_history import RunHistory

AUTO_OVERHEAD_PCT = 1.0
"""Default of ``max_overhead_pct`` under "auto"."""
SHORTEST_S, LONGEST_S = 30.0, 4 * 3600.0
"""Limits of the interval under "auto". If failures are expected more often than every 5 minutes, the lower
limit is a tenth of the time between them. No interval is stretched to more than the upper limit."""
RETRY_S = 60.0
"""Seconds until the next save if one was tried and its cost is still unknown."""
HYSTERESIS = 1.25
"""An interval is lowered only if it falls by this factor, and reported only if it changes by it."""
NEVER = math.inf
_LARGEST_MS = 1 << 62


@dataclass(frozen=True)
class Measured:
    """Measurements of saves and failures so far."""

    cost_s: float | None = None
    """See ``overhead.cost_s``."""
    durable_s: float = 0.0
    """Median time from a save's call to its commit."""
    has_baseline: bool = False
    """Whether there is a baseline, which the measurement of a save needs."""
    tried: bool = False
    """Whether a save has begun since the baseline exists."""
    writing: bool = False
    """Whether a save is pending."""
    mtti_s: float = math.inf
    """Expected mean time to an interruption."""


@dataclass(frozen=True)
class SaveIntervals:
    """Seconds between the last save and the next."""

    bound_s: float = 0.0
    """The least, for a save that ``interval`` or ``interval_minutes`` makes due."""
    auto_s: float = NEVER
    """The time at which "auto" makes a save due."""
    why: str = ""
    """What determines ``auto_s``: ``failures``, ``overhead`` or ``writing``; empty without measurements."""


def save_intervals(measured: Measured, *, auto: bool, max_overhead_pct: float | None) -> SaveIntervals:
    """Return the intervals that follow from the measurements. A pure function.

    A save that costs C seconds takes P percent of the time if saves are 100 C / P seconds apart.
    "auto" uses the longest of three: Daly's interval for C and the mean time to an interruption;
    100 C / P; and the time that a save takes to be durable. The first save of an attempt waits for
    a baseline and is due as soon as there is one, so that it is measured: an earlier attempt may
    have measured a stall that is over.
    """
    if max_overhead_pct is None:
        return SaveIntervals()
    if measured.cost_s is None:
        wait_s = RETRY_S if measured.tried else 0.0
        if measured.writing or not measured.has_baseline:
            wait_s = NEVER
        return SaveIntervals(wait_s, wait_s if auto else NEVER)
    if measured.has_baseline and not measured.tried:
        return SaveIntervals(0.0, 0.0 if auto else NEVER)
    bound_s = min(100 * measured.cost_s / max_overhead_pct, LONGEST_S)
    if not auto:
        return SaveIntervals(bound_s)
    shortest_s = min(SHORTEST_S, measured.mtti_s / 10)
    wanted_s = min(max(daly(measured.cost_s, measured.mtti_s), shortest_s), LONGEST_S)
    durable_s = min(measured.durable_s, LONGEST_S)
    auto_s = max(wanted_s, bound_s, durable_s)
    why = "failures" if auto_s == wanted_s else "overhead" if auto_s == bound_s else "writing"
    return SaveIntervals(bound_s, auto_s, why)


def apply_hysteresis(current: float, wanted: float) -> float:
    """Return ``wanted`` if it is longer, or shorter by the factor ``HYSTERESIS``; else ``current``."""
    return wanted if wanted > current or wanted < current / HYSTERESIS else current


class SaveIntervalController:
    """Controls the time between saves by the first rank's ``clock``. Does nothing on other ranks."""

    def __init__(self, config: CheckpointConfig, clock: StepTimer, *, rank: int, ranks: int) -> None:
        self._clock = clock
        self._auto = config.interval == "auto"
        self._every = 0 if config.interval == "auto" else config.interval
        self._minutes = config.interval_minutes
        self._max_pct = config.max_overhead_pct or (AUTO_OVERHEAD_PCT if self._auto else None)
        hours = config.expected_mtti_hours
        self._prior_s = prior_mtti(ranks) if hours is None else 3600 * hours
        self._failures, self._exposure_s = 0, 0.0
        self._earlier: list[SaveCost] = []
        self._current = SaveIntervals()
        self._reported_s: float | None = None
        self._message = ""
        self._is_active = rank == 0 and self._max_pct is not None

    def load_history(self, history: RunHistory, *, resumed_at: int) -> None:
        """Load the failures of earlier attempts, and the costs of their saves in the same layout.

        Ignore a record that cannot be read: it must not prevent training.
        """
        if self._is_active:
            with contextlib.suppress(OSError):
                rollbacks = lineage.rollbacks(history.run_dir)
                numbers = [attempt for attempt, _ in rollbacks]
                self._use_history(history.attempts(rollbacks), resumed_at, numbers)

    def _use_history(
        self, history: Sequence[AttemptHistory], resumed_at: int, rollbacks: Sequence[int]
    ) -> None:
        if not history:
            return
        self._failures, self._exposure_s = interruptions(history, resumed_at=resumed_at, rollbacks=rollbacks)
        this = history[-1]
        commits = [
            event
            for attempt in history[:-1]
            if attempt.start and this.start and attempt.start.get("layout") == this.start.get("layout")
            for event in attempt.commits
            if event.get("tax_s") is not None
        ]
        self._earlier = [
            SaveCost(ended_s=event["tax_s"], blocked_s=event["blocking_s"], durable_s=event["total_s"])
            for event in commits[-SAVES_WINDOW:]
        ]

    def _update(self) -> SaveIntervals:
        """Return the intervals that follow from the current measurements."""
        meter = self._clock.meter
        saves = meter.measured or self._earlier
        exposure_s = self._exposure_s + self._clock.elapsed_s
        measured = Measured(
            cost_s=cost_s(saves),
            durable_s=statistics.median(save.durable_s for save in saves) if saves else 0.0,
            has_baseline=meter.baseline_step_s is not None,
            tried=meter.tried,
            writing=meter.is_pending,
            mtti_s=expected_mtti(self._failures, exposure_s, prior_s=self._prior_s),
        )
        wanted = save_intervals(measured, auto=self._auto, max_overhead_pct=self._max_pct)
        self._current = SaveIntervals(
            apply_hysteresis(self._current.bound_s, wanted.bound_s),
            apply_hysteresis(self._current.auto_s, wanted.auto_s),
            wanted.why,
        )
        if measured.cost_s is not None and (measured.tried or not measured.has_baseline):
            self._update_message(measured, meter.baseline_step_s)
        return self._current

    def votes(self) -> tuple[int, int]:
        """Return ``bound_s`` and ``auto_s`` in whole milliseconds, for the agreement of all ranks."""
        if not self._is_active:
            return 0, 0
        intervals = self._update()
        # A pending save may change the interval. After a skipped save, do not check a full disk at each step.
        waits = self._clock.meter.is_pending or self._clock.since_skip_s < RETRY_S
        auto_s = NEVER if waits else intervals.auto_s
        return _milliseconds(intervals.bound_s), _milliseconds(auto_s)

    def with_interval(self, reports: list[SaveReport]) -> list[SaveReport]:
        """Return ``reports`` with the interval that now follows them."""
        if not self._is_active or not reports:
            return reports
        self._update()
        interval_s = self._interval_s(self._clock.meter.baseline_step_s)
        return [replace(report, interval_s=interval_s) for report in reports]

    def _interval_s(self, step_s: float | None) -> float | None:
        """Return the current seconds between saves, with baseline steps of ``step_s``; None if unknown."""
        if self._auto and not self._current.why:
            return None
        natural_s = self._natural_s(step_s)
        stretched_s = None if natural_s is None else max(self._current.bound_s, natural_s)
        if not self._auto:
            return stretched_s
        return self._current.auto_s if stretched_s is None else min(self._current.auto_s, stretched_s)

    def _natural_s(self, step_s: float | None) -> float | None:
        """Return the configured seconds between saves, not stretched; None if not set or unknown."""
        times = [60 * self._minutes] if self._minutes is not None else []
        if self._every and step_s is not None:
            times.append(self._every * step_s)
        return min(times, default=None)

    def status_message(self) -> str:
        """Return a message if the interval has changed much since the last call; else an empty text."""
        message, self._message = self._message, ""
        return message

    def _update_message(self, measured: Measured, step_s: float | None) -> None:
        natural_s = self._natural_s(step_s)
        if self._auto:
            now_s = self._current.auto_s
        elif natural_s is None:
            return
        else:
            now_s = max(self._current.bound_s, natural_s)
            self._reported_s = natural_s if self._reported_s is None else self._reported_s
        if self._reported_s is not None and 1 / HYSTERESIS < now_s / self._reported_s < HYSTERESIS:
            return
        self._reported_s = now_s
        assert measured.cost_s is not None
        cost = f"a save costs {_duration(measured.cost_s)}"
        if self._auto:
            reasons = {
                "failures": f"{cost}, one failure in {_duration(measured.mtti_s)} expected",
                "overhead": f"{cost}, at most {self._max_pct:g}% of the time",
                "writing": f"a save takes {_duration(measured.durable_s)} to be durable",
            }
            self._message = f"checkpoint interval: {_duration(now_s)} (auto: {reasons[self._current.why]})"
        elif natural_s is not None and self._current.bound_s > natural_s:
            self._message = (
                f"checkpoint interval: stretched to {_duration(now_s)} ({cost}, "
                f"checkpoint.max_overhead_pct is {self._max_pct:g})"
            )
        else:
            self._message = f"checkpoint interval: as configured, {_duration(now_s)} ({cost})"


def _milliseconds(seconds: float) -> int:
    return math.ceil(min(1000 * seconds, _LARGEST_MS))


def _duration(seconds: float) -> str:
    """Format seconds as ``0.12 s``, ``95 s``, ``20 min`` or ``3.2 h``."""
    if seconds >= 3 * 3600:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 300:
        return f"{seconds / 60:.0f} min"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
