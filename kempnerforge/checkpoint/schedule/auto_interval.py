"""How far apart saves are under ``interval``, ``interval_minutes`` and ``"auto"``.

``spacing`` is a pure function of measurements. ``SaveIntervalController`` calls it on the first rank and
damps the result, which reaches all ranks with the one agreement of each step. See docs/interval.md.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kempnerforge.checkpoint.results import SaveReport
from kempnerforge.checkpoint.run import lineage
from kempnerforge.checkpoint.schedule.overhead import SAVES_WINDOW, SaveCost, StepTimer, cost_s
from kempnerforge.config.schema import CheckpointConfig
from kempnerforge.goodput.accounting import interruptions
from kempnerforge.goodput.history import AttemptHistory, read_history
from kempnerforge.goodput.interval import daly, expected_mtti, prior_mtti

AUTO_OVERHEAD_PCT = 1.0
"""``max_overhead_pct`` of "auto", where none is given."""
SHORTEST_S, LONGEST_S = 30.0, 4 * 3600.0
"""Bounds on the interval of "auto". Where failures are expected more often than every 5 minutes, the lower
bound is a tenth of the time between them. Nothing stretches an interval to more than the upper one."""
RETRY_S = 60.0
"""Until the next save when one was tried and what it costs is still not known."""
HYSTERESIS = 1.25
"""Factor by which a spacing must fall to follow, and change to be told."""
NEVER = math.inf
_LARGEST_MS = 1 << 62


@dataclass(frozen=True)
class Measured:
    """What is known of saves and failures by now."""

    cost_s: float | None = None
    """``tax.cost_s``."""
    durable_s: float = 0.0
    """Median time from a save's call to its commit."""
    has_baseline: bool = False
    """Whether quiet steps are known, beside which a save can be measured."""
    tried: bool = False
    """Whether a save began since."""
    writing: bool = False
    """Whether one is under way."""
    mtti_s: float = math.inf


@dataclass(frozen=True)
class SaveIntervals:
    """Seconds between the last save and the next."""

    bound_s: float = 0.0
    """At least, for one that an interval makes due."""
    auto_s: float = NEVER
    """For one by "auto"."""
    why: str = ""
    """What sets ``auto_s``: ``failures``, ``overhead`` or ``writing``; empty while nothing is measured."""


def spacing(known: Measured, *, auto: bool, max_overhead_pct: float | None) -> SaveIntervals:
    """How far apart saves are to be. Pure.

    A save that costs C seconds takes at most P percent of the time when saves are 100 C / P apart; "auto"
    takes Daly's interval for C and the mean time to an interruption, if that and the time that a save takes
    to be durable are not longer. The first save of an attempt waits for quiet steps and comes as soon as
    they are known, so that it can be measured: what earlier attempts measured may be a stall that is over.
    """
    if max_overhead_pct is None:
        return SaveIntervals()
    if known.cost_s is None:
        wait_s = RETRY_S if known.tried else 0.0
        if known.writing or not known.has_baseline:
            wait_s = NEVER
        return SaveIntervals(wait_s, wait_s if auto else NEVER)
    if known.has_baseline and not known.tried:
        return SaveIntervals(0.0, 0.0 if auto else NEVER)
    bound_s = min(100 * known.cost_s / max_overhead_pct, LONGEST_S)
    if not auto:
        return SaveIntervals(bound_s)
    shortest_s = min(SHORTEST_S, known.mtti_s / 10)
    wanted_s = min(max(daly(known.cost_s, known.mtti_s), shortest_s), LONGEST_S)
    durable_s = min(known.durable_s, LONGEST_S)
    auto_s = max(wanted_s, bound_s, durable_s)
    why = "failures" if auto_s == wanted_s else "overhead" if auto_s == bound_s else "writing"
    return SaveIntervals(bound_s, auto_s, why)


def steady(held: float, wanted: float) -> float:
    """Rise at once, fall only by a good part: a spacing that follows every measurement flaps. Pure."""
    return wanted if wanted > held or wanted < held / HYSTERESIS else held


class SaveIntervalController:
    """Paces the saves of one attempt, by the first rank's ``clock``: on other ranks it has nothing to say."""

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
        self._held = SaveIntervals()
        self._told_s: float | None = None
        self._news = ""
        self._is_active = rank == 0 and self._max_pct is not None

    def remember(self, run_dir: Path, *, resumed_at: int) -> None:
        """Learn from earlier attempts: how often they failed, and what saves cost in the same layout.

        Nothing, if their record cannot be read: it is no reason not to train.
        """
        if self._is_active:
            with contextlib.suppress(OSError):
                rollbacks = lineage.rollbacks(run_dir)
                self._learn(read_history(run_dir, rollbacks=rollbacks), resumed_at, rollbacks)

    def _learn(self, history: Sequence[AttemptHistory], resumed_at: int, rollbacks: Sequence[int]) -> None:
        if not history:
            return
        self._failures, self._exposure_s = interruptions(history, resumed_at=resumed_at, rollbacks=rollbacks)
        now = history[-1]
        commits = [
            event
            for one in history[:-1]
            if one.start and now.start and one.start.get("layout") == now.start.get("layout")
            for event in one.commits
            if event.get("tax_s") is not None
        ]
        self._earlier = [
            SaveCost(ended_s=event["tax_s"], blocked_s=event["blocking_s"], durable_s=event["total_s"])
            for event in commits[-SAVES_WINDOW:]
        ]

    def _update(self) -> SaveIntervals:
        """The spacing by what is known now."""
        meter = self._clock.meter
        saves = meter.known or self._earlier
        exposure_s = self._exposure_s + self._clock.elapsed_s
        known = Measured(
            cost_s=cost_s(saves),
            durable_s=statistics.median(save.durable_s for save in saves) if saves else 0.0,
            has_baseline=meter.baseline_step_s is not None,
            tried=meter.tried,
            writing=meter.is_pending,
            mtti_s=expected_mtti(self._failures, exposure_s, prior_s=self._prior_s),
        )
        found = spacing(known, auto=self._auto, max_overhead_pct=self._max_pct)
        held = self._held
        self._held = SaveIntervals(
            steady(held.bound_s, found.bound_s), steady(held.auto_s, found.auto_s), found.why
        )
        if known.cost_s is not None and (known.tried or not known.has_baseline):
            self._tell(known, meter.baseline_step_s)
        return self._held

    def votes(self) -> tuple[int, int]:
        """``bound_s`` and ``auto_s`` in whole milliseconds, for the agreement of all ranks."""
        if not self._is_active:
            return 0, 0
        found = self._update()
        # What is under way may change the spacing; a disk that is full is not looked at after every step.
        waits = self._clock.meter.is_pending or self._clock.since_skip_s < RETRY_S
        auto_s = NEVER if waits else found.auto_s
        return _milliseconds(found.bound_s), _milliseconds(auto_s)

    def paced(self, reports: list[SaveReport]) -> list[SaveReport]:
        """``reports`` with the spacing as it is behind them."""
        if not self._is_active or not reports:
            return reports
        self._update()
        interval_s = self._interval_s(self._clock.meter.baseline_step_s)
        return [replace(report, interval_s=interval_s) for report in reports]

    def _interval_s(self, step_s: float | None) -> float | None:
        """Seconds between saves as they are paced now, with quiet steps of ``step_s``; None if not known."""
        if self._auto and not self._held.why:
            return None
        natural_s = self._natural_s(step_s)
        held_s = None if natural_s is None else max(self._held.bound_s, natural_s)
        if not self._auto:
            return held_s
        return self._held.auto_s if held_s is None else min(self._held.auto_s, held_s)

    def _natural_s(self, step_s: float | None) -> float | None:
        """Seconds between saves that nothing stretches; None where no number is set, or none is known."""
        times = [60 * self._minutes] if self._minutes is not None else []
        if self._every and step_s is not None:
            times.append(self._every * step_s)
        return min(times, default=None)

    def status_message(self) -> str:
        """What there is to tell since the last call; empty when nothing has changed by much."""
        news, self._news = self._news, ""
        return news

    def _tell(self, known: Measured, step_s: float | None) -> None:
        natural_s = self._natural_s(step_s)
        if self._auto:
            now_s = self._held.auto_s
        elif natural_s is None:
            return
        else:
            now_s = max(self._held.bound_s, natural_s)
            self._told_s = natural_s if self._told_s is None else self._told_s
        if self._told_s is not None and 1 / HYSTERESIS < now_s / self._told_s < HYSTERESIS:
            return
        self._told_s = now_s
        assert known.cost_s is not None
        cost = f"a save costs {_duration(known.cost_s)}"
        if self._auto:
            reasons = {
                "failures": f"{cost}, one failure in {_duration(known.mtti_s)} expected",
                "overhead": f"{cost}, at most {self._max_pct:g}% of the time",
                "writing": f"a save takes {_duration(known.durable_s)} to be durable",
            }
            self._news = f"checkpoint interval: {_duration(now_s)} (auto: {reasons[self._held.why]})"
        elif natural_s is not None and self._held.bound_s > natural_s:
            self._news = (
                f"checkpoint interval: stretched to {_duration(now_s)} ({cost}, "
                f"checkpoint.max_overhead_pct is {self._max_pct:g})"
            )
        else:
            self._news = f"checkpoint interval: as configured, {_duration(now_s)} ({cost})"


def _milliseconds(seconds: float) -> int:
    return math.ceil(min(1000 * seconds, _LARGEST_MS))


def _duration(seconds: float) -> str:
    """``0.12 s``, ``95 s``, ``3.2 h``."""
    if seconds >= 3 * 3600:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 300:
        return f"{seconds / 60:.0f} min"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
