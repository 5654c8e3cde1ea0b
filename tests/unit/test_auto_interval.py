"""How far apart saves are: tables of what is known and what follows; the words for it; earlier attempts."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.clock import FakeClock

from kempnerforge.checkpoint.schedule import overhead
from kempnerforge.checkpoint.schedule.auto_interval import (
    LONGEST_S,
    NEVER,
    RETRY_S,
    SHORTEST_S,
    Measured,
    SaveIntervalController,
    SaveIntervals,
    apply_hysteresis,
    save_intervals,
)
from kempnerforge.checkpoint.schedule.overhead import StepTimer
from kempnerforge.checkpoint.schedule.save_policy import SavePolicy
from kempnerforge.config.schema import CheckpointConfig
from kempnerforge.goodput.accounting import interruptions, saving
from kempnerforge.goodput.history import derive
from kempnerforge.goodput.interval import daly, expected_mtti, prior_mtti
from kempnerforge.goodput.run_history import RunHistory

HOUR = 3600.0
COLD = Measured()
FIRST = Measured(has_baseline=True)
WRITING = Measured(has_baseline=True, tried=True, writing=True)
TRIED = Measured(has_baseline=True, tried=True)


def known(cost_s: float, *, mtti_s: float = 24 * HOUR, durable_s: float = 1.0) -> Measured:
    return Measured(cost_s=cost_s, durable_s=durable_s, has_baseline=True, tried=True, mtti_s=mtti_s)


OTHERS = Measured(cost_s=2.0, durable_s=1.0, has_baseline=True)


TABLE: list[tuple[str, Measured, bool, float | None, SaveIntervals]] = [
    ("nothing paces", known(5.0), False, None, SaveIntervals(0.0, NEVER)),
    ("before quiet steps are known nothing could be measured", COLD, False, 1.0, SaveIntervals(NEVER, NEVER)),
    ("the first save comes as soon as it can be measured", FIRST, True, 1.0, SaveIntervals(0.0, 0.0)),
    ("the first multiple", FIRST, False, 1.0, SaveIntervals(0.0, NEVER)),
    ("it is under way", WRITING, True, 1.0, SaveIntervals(NEVER, NEVER)),
    ("it has failed", TRIED, True, 1.0, SaveIntervals(RETRY_S, RETRY_S)),
    ("a bound alone", known(0.5), False, 2.0, SaveIntervals(25.0, NEVER)),
    ("a bound of all time", known(0.5), False, 100.0, SaveIntervals(0.5, NEVER)),
    ("Daly", known(2.0, mtti_s=HOUR), True, 10.0, SaveIntervals(20.0, daly(2.0, HOUR), "failures")),
    ("Daly, with few failures", known(0.5), True, 1.0, SaveIntervals(50.0, daly(0.5, 24 * HOUR), "failures")),
    ("the bound is longer", known(2.0, mtti_s=HOUR), True, 1.0, SaveIntervals(200.0, 200.0, "overhead")),
    ("writing is longer", known(0.5, durable_s=900.0), True, 1.0, SaveIntervals(50.0, 900.0, "writing")),
    ("no shorter than this", known(0.0), True, 1.0, SaveIntervals(0.0, SHORTEST_S, "failures")),
    ("unless failures are as near", known(0.0, mtti_s=60.0), True, 1.0, SaveIntervals(0.0, 6.0, "failures")),
    ("no longer than this", known(90.0, mtti_s=1e9), True, 100.0, SaveIntervals(90.0, LONGEST_S, "failures")),
    ("whatever the bound says", known(600.0), True, 1.0, SaveIntervals(LONGEST_S, LONGEST_S, "overhead")),
    (
        "however long it takes to write",
        known(0.5, durable_s=1e6),
        True,
        1.0,
        SaveIntervals(50.0, LONGEST_S, "writing"),
    ),
    ("an attempt measures for itself", OTHERS, True, 1.0, SaveIntervals(0.0, 0.0)),
    ("once it can", replace(OTHERS, has_baseline=False), False, 1.0, SaveIntervals(200.0, NEVER)),
]


@pytest.mark.parametrize(("what", "measured", "auto", "percent", "expected"), TABLE)
def test_spacing_table_matches(
    what: str, measured: Measured, auto: bool, percent: float | None, expected: SaveIntervals
) -> None:
    found = save_intervals(measured, auto=auto, max_overhead_pct=percent)
    assert (found.bound_s, found.auto_s) == pytest.approx((expected.bound_s, expected.auto_s)), what
    assert found.why == expected.why


@given(
    cost_s=st.floats(0, 1e5),
    mtti_s=st.floats(1, 1e9),
    durable_s=st.floats(0, 1e5),
    percent=st.floats(0.01, 100),
)
def test_spacing_auto_within_bounds(cost_s: float, mtti_s: float, durable_s: float, percent: float) -> None:
    found = save_intervals(
        known(cost_s, mtti_s=mtti_s, durable_s=durable_s), auto=True, max_overhead_pct=percent
    )
    assert max(found.bound_s, min(SHORTEST_S, mtti_s / 10)) <= found.auto_s <= LONGEST_S
    if found.auto_s < LONGEST_S:
        assert found.auto_s >= durable_s
        assert cost_s <= found.auto_s * percent / 100 * (1 + 1e-9)


@pytest.mark.parametrize(
    ("current", "wanted", "expected"),
    [
        (NEVER, NEVER, NEVER),
        (NEVER, 0.0, 0.0),
        (0.0, 60.0, 60.0),
        (100.0, 100.1, 100.1),
        (100.0, 99.0, 100.0),
        (100.0, 81.0, 100.0),
        (100.0, 79.0, 79.0),
    ],
)
def test_spacing_steady_rises_at_once_falls_on_large_drop(
    current: float, wanted: float, expected: float
) -> None:
    assert apply_hysteresis(current, wanted) == expected


def policy(**settings: Any) -> SavePolicy:
    return SavePolicy.from_config(CheckpointConfig.model_validate(settings))


def test_save_policy_bound_delays_intervals_only() -> None:
    found = policy(interval=10, interval_minutes=1.0, at_steps=[20], save_first=True)
    early: dict[str, Any] = {"seconds_since_last_save": 60.0, "bound_s": 90.0}
    assert found.due(10, **early) is None
    assert found.due(11, **early) is None, "nor minutes"
    assert found.due(20, **early) == "listed"
    assert found.due(0, **early) == "first"
    assert found.due(10, requested=True, **early) == "requested"
    assert found.due(30, seconds_since_last_save=90.0, bound_s=90.0) == "interval"
    assert found.due(31, seconds_since_last_save=90.0, bound_s=90.0) == "minutes"


def test_save_policy_auto_due_by_clock_after_step() -> None:
    found = policy(interval="auto")
    assert found.due(7, seconds_since_last_save=9.9, auto_s=10.0) is None
    assert found.due(7, seconds_since_last_save=10.0, auto_s=10.0) == "auto"
    assert found.due(0, seconds_since_last_save=10.0, auto_s=10.0) is None
    assert found.due(7, seconds_since_last_save=1e9) is None, "not before anything was agreed on"
    assert found.plans_saves


# -- failures ----------------------------------------------------------------------------------------------


def test_expected_mtti_failures_shift_prior() -> None:
    assert prior_mtti(1) == prior_mtti(8) == 24 * HOUR
    assert prior_mtti(16_384) == pytest.approx(3.05 * HOUR, rel=0.01), "Llama 3: 419 in 54 days"
    assert expected_mtti(0, 0.0, prior_s=24 * HOUR) == 24 * HOUR
    assert expected_mtti(0, 240 * HOUR, prior_s=24 * HOUR) == 264 * HOUR
    assert expected_mtti(5, 36 * HOUR, prior_s=24 * HOUR) == 10 * HOUR
    assert expected_mtti(1000, 1000 * HOUR, prior_s=24 * HOUR) == pytest.approx(HOUR, rel=0.03)


def attempts(*rows: tuple[str, int, int, float], running: bool = True) -> list[dict[str, Any]]:
    """Events of attempts as (kind, began at, last step, seconds trained); then of one that runs."""
    events: list[dict[str, Any]] = []
    now = 0.0
    for number, (kind, began, last, seconds) in enumerate(rows, 1):
        layout = {"num_ranks": 2 if number > 1 else 1}
        common = {"attempt": number}
        events.append({"event": "start", "time": now, "layout": layout, "process_started": now, **common})
        if kind != "config":
            events.append({"event": "resume", "step": began, "time": now + 5, **common})
            events.append({"event": "progress", "step": last, "time": now + 5 + seconds, **common})
        commit = {"blocking_s": 0.5, "total_s": 3.0, "write_s": 2.0, "commit_s": 0.1, "tax_s": float(number)}
        events.append({"event": "commit", "step": began, "time": now + 5, **common, **commit})
        if kind != "lost":
            end = {"kind": kind, "reason": kind, "step": last, "time": now + 5 + seconds}
            events.append({"event": "end", **end, **common})
        now += 1000.0
    if running:
        start = {"event": "start", "attempt": len(rows) + 1, "time": now, "process_started": now}
        events.append({**start, "layout": {"num_ranks": 2}})
    return events


FAILURES: list[tuple[str, list[tuple[str, int, int, float]], int, list[int], tuple[int, float]]] = [
    ("none yet", [], 0, [], (0, 0.0)),
    ("killed", [("lost", 0, 50, 100.0), ("lost", 40, 90, 100.0)], 80, [], (2, 200.0)),
    ("a fault of its own", [("fault", 0, 50, 100.0)], 40, [], (1, 100.0)),
    ("stopped in time", [("stopped", 0, 50, 100.0), ("deadline", 50, 90, 70.0)], 90, [], (0, 170.0)),
    ("stopped, and steps were lost", [("stopped", 0, 50, 100.0)], 40, [], (1, 100.0)),
    ("the same between attempts", [("deadline", 0, 50, 9.0), ("stopped", 40, 90, 9.0)], 90, [], (1, 18.0)),
    ("rolled back by a user", [("stopped", 0, 50, 100.0), ("config", 0, 0, 0.0)], 40, [2], (0, 100.0)),
    ("finished and continued", [("finished", 0, 50, 100.0)], 50, [], (0, 100.0)),
    ("did not get as far as training", [("config", 0, 0, 0.0)], 0, [], (0, 0.0)),
]


@pytest.mark.parametrize(("what", "rows", "resumed_at", "rollbacks", "expected"), FAILURES)
def test_interruptions_table_counts_failures(
    what: str, rows: Any, resumed_at: int, rollbacks: list[int], expected: tuple[int, float]
) -> None:
    history = derive(attempts(*rows), [], rollbacks=rollbacks)
    found = interruptions(history, resumed_at=resumed_at, rollbacks=rollbacks)
    assert found == expected, what


def test_saving_ledger_with_overhead_uses_it() -> None:
    events = attempts(("lost", 0, 50, 100.0), ("lost", 40, 90, 100.0), ("lost", 80, 95, 100.0))
    assert saving(derive(events, []), wall_s=3000.0)["daly_s"] == pytest.approx(daly(2.0, 100.0))
    for event in events:
        event.pop("tax_s", None)
    assert saving(derive(events, []), wall_s=3000.0)["daly_s"] == pytest.approx(daly(0.5, 100.0))


# -- the pacer ---------------------------------------------------------------------------------------------


def make_pacer(rank: int = 0, ranks: int = 2, **settings: Any) -> tuple[SaveIntervalController, StepTimer]:
    clock = StepTimer()
    return SaveIntervalController(
        CheckpointConfig.model_validate(settings), clock, rank=rank, ranks=ranks
    ), clock


def run_steps(clock: StepTimer, count: int, seconds: float = 2.0) -> None:
    for _ in range(count):
        clock.meter.step_end(1, seconds)


def run_save(clock: StepTimer, overhead_s: float, *, step_s: float = 2.0, durable_s: float = 1.0) -> None:
    clock.meter.save_begins()
    clock.meter.step_end(1, step_s + overhead_s)
    clock.meter.save_ended(durable_s=durable_s, at_boundary=True)


def test_pacer_auto_interval_votes_and_news() -> None:
    pacer, clock = make_pacer(interval="auto")
    assert min(pacer.votes()) > 1e15
    run_steps(clock, 8)
    assert pacer.votes() == (0, 0)
    clock.meter.save_begins()
    assert min(pacer.votes()) > 1e15
    clock.meter.step_end(1, 2.12)
    clock.meter.save_ended(durable_s=0.0, at_boundary=True)
    assert pacer.votes() == (60_000, 60_000)
    run_save(clock, 0.12)
    bound_ms, auto_ms = pacer.votes()
    assert bound_ms == pytest.approx(12_000, rel=0.01)
    assert auto_ms == pytest.approx(1000 * daly(0.12, 24 * HOUR), rel=0.01)
    news = "checkpoint interval: 144 s (auto: a save costs 0.12 s, one failure in 24.0 h expected)"
    assert pacer.status_message() == news
    assert pacer.status_message() == ""
    clock.meter.save_begins()
    assert pacer.votes() == (bound_ms, 1 << 62), "what is being written is waited for"
    clock.meter.step_end(1, 2.12)
    clock.meter.save_ended(durable_s=1.0, at_boundary=True)
    for _ in range(8):
        run_save(clock, 0.121)
    assert pacer.votes()[1] >= auto_ms
    assert pacer.status_message() == "", "no change worth a word"
    for _ in range(8):
        run_save(clock, 30.0)
    assert pacer.votes() == (pytest.approx(3_000_000), pytest.approx(3_000_000))
    message = "checkpoint interval: 50 min (auto: a save costs 30 s, at most 1% of the time)"
    assert pacer.status_message() == message
    for _ in range(8):
        run_save(clock, 0.1, durable_s=4000.0)
    assert pacer.votes()[1] == pytest.approx(4_000_000)
    assert pacer.status_message() == "checkpoint interval: 67 min (auto: a save takes 67 min to be durable)"
    clock.skipped()
    assert pacer.votes()[1] > 1e15, "a full disk is not looked at after every step"


def test_pacer_step_interval_stretched_then_relaxed() -> None:
    pacer, clock = make_pacer(interval=10, max_overhead_pct=5.0)
    run_steps(clock, 10)
    run_save(clock, 0.5)
    assert pacer.votes()[0] == pytest.approx(10_000)
    assert pacer.status_message() == "", "20 s of steps are longer than the bound"
    for _ in range(8):
        run_save(clock, 2.0)
        run_steps(clock, 1)
    assert pacer.votes()[0] == pytest.approx(40_000)
    news = "checkpoint interval: stretched to 40 s (a save costs 2 s, checkpoint.max_overhead_pct is 5)"
    assert pacer.status_message() == news
    for overhead_s in (1.9, 2.1, 1.8, 1.7, 2.2):
        run_save(clock, overhead_s)
        pacer.votes()
        assert pacer.status_message() == "", "noise is no news"
    for _ in range(8):
        run_save(clock, 0.25)
        run_steps(clock, 1)
    assert pacer.votes()[0] == pytest.approx(5_000)
    assert pacer.status_message() == "checkpoint interval: as configured, 20 s (a save costs 0.25 s)"


def test_pacer_other_rank_or_nothing_paced_is_silent() -> None:
    for pacer, clock in (make_pacer(rank=1, interval="auto"), make_pacer(interval=10)):
        run_steps(clock, 10)
        run_save(clock, 5.0)
        assert pacer.votes() == (0, 0)
        assert pacer.status_message() == ""


def test_pacer_earlier_attempts_give_cost_and_failures(tmp_path: Path) -> None:
    rows = [("lost", 0, 50, 400.0), ("lost", 40, 90, 400.0), ("lost", 80, 95, 400.0)]
    text = "".join(json.dumps(event) + "\n" for event in attempts(*rows))
    (tmp_path / "ledger.jsonl").write_text(text)
    pacer, _ = make_pacer(interval="auto", max_overhead_pct=50.0, expected_mtti_hours=1.0)
    pacer.load_history(RunHistory(tmp_path), resumed_at=90)
    # Attempts 2 and 3 had this layout: (2 + 3) / 2. Three failures in 1200 s, one in 3600 s before.
    assert pacer.votes()[1] == pytest.approx(1000 * daly(2.5, (3600 + 1200) / 4), rel=1e-3)
    news = "checkpoint interval: 76 s (auto: a save costs 2.5 s, one failure in 20 min expected)"
    assert pacer.status_message() == news
    fresh, _ = make_pacer(interval="auto")
    fresh.load_history(RunHistory(tmp_path / "gone"), resumed_at=0)
    assert math.isclose(fresh.votes()[1], 1 << 62), "no record is no reason not to train"


# -- the loop that is controlled -----------------------------------------------------------------------------

STEP_S = 20.0


class Training:
    """Attempts of a run on a clock of its own, paced as real ones. ``costs``: save number -> its cost."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, costs: Callable[[int], float], **settings: Any
    ) -> None:
        self.time = FakeClock().replace_in(monkeypatch, overhead)
        self.costs = costs
        self.settings = settings
        self.begun: list[float] = []
        """When each save began."""
        self.commits: list[dict[str, Any]] = []

    def attempt(self, seconds: float) -> None:
        """Train so long."""
        config = CheckpointConfig.model_validate(self.settings)
        clock, policy = StepTimer(), SavePolicy.from_config(config)
        pacer = SaveIntervalController(config, clock, rank=0, ranks=2)
        pacer._use_history(derive(self.events(), []), 0, ())
        clock.restart(0)
        step, ends = 0, self.time.now + seconds
        while self.time.now < ends:
            self.time.advance(STEP_S)
            step += 1
            clock.step_end(step)
            bound_s, auto_s = (ms / 1000 for ms in pacer.votes())
            since_s = clock.since_save_s
            if policy.due(step, seconds_since_last_save=since_s, bound_s=bound_s, auto_s=auto_s):
                cost_s = self.costs(len(self.begun))
                self.begun.append(self.time.now)
                clock.save_begins()
                self.time.advance(STEP_S + cost_s)
                step += 1
                clock.step_end(step)
                clock.meter.save_ended(durable_s=cost_s + 1.0, at_boundary=True)
                commit = {"blocking_s": 0.0, "total_s": cost_s + 1.0, "tax_s": cost_s}
                self.commits.append({"event": "commit", "time": self.time.now, "attempt": 1, **commit})

    def events(self) -> list[dict[str, Any]]:
        """The ledger so far, as an attempt sees it that begins now."""
        start = {"event": "start", "time": 0.0, "process_started": 0.0, "layout": {"num_ranks": 2}}
        return [{**start, "attempt": 1}, *self.commits, {**start, "attempt": 2}]

    def gaps(self) -> list[float]:
        """Seconds between saves."""
        return [later - earlier for earlier, later in itertools.pairwise(self.begun)]


PACED = [{"interval": "auto"}, {"interval": 10, "max_overhead_pct": 1.0}]


@pytest.mark.parametrize("settings", PACED, ids=["auto", "bound"])
@pytest.mark.parametrize("stalled", [0, 1, 2, 7, 20])
@pytest.mark.parametrize("stall_s", [1200.0, 100_000.0])
def test_pacer_one_stall_does_not_stop_saves(
    monkeypatch: pytest.MonkeyPatch, settings: Any, stalled: int, stall_s: float
) -> None:
    """A file system that fails over, a job that is suspended: afterwards saves come as before."""
    calm = Training(monkeypatch, lambda number: 0.5, **settings)
    calm.attempt(24 * HOUR)
    usual_s = max(calm.gaps()[1:])
    run = Training(monkeypatch, lambda number: stall_s if number == stalled else 0.5, **settings)
    run.attempt(24 * HOUR + stall_s)
    gaps = [gap - (stall_s if number == stalled else 0.0) for number, gap in enumerate(run.gaps())]
    assert max(gaps) <= LONGEST_S + 100
    after = gaps[stalled + 1 :]
    assert len(after) > 50
    assert all(gap <= 4 * usual_s + 2 * STEP_S for gap in after[1:])


@pytest.mark.parametrize("settings", PACED, ids=["auto", "bound"])
def test_pacer_restart_measures_anew(monkeypatch: pytest.MonkeyPatch, settings: Any) -> None:
    run = Training(monkeypatch, lambda number: 3600.0 if number == 0 else 0.5, **settings)
    for _ in range(3):
        began = run.time.now
        known = len(run.begun)
        run.attempt(2 * HOUR)
        assert run.begun[known] - began < 60 * STEP_S, "the first save of an attempt is a measure"
    assert len(run.begun) > 10


def test_pacer_auto_zero_and_huge_costs_stay_in_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    free = Training(monkeypatch, lambda number: 0.0, interval="auto")
    free.attempt(2 * HOUR)
    assert all(gap >= SHORTEST_S for gap in free.gaps()[1:])
    huge = Training(monkeypatch, lambda number: 900.0, interval="auto")
    huge.attempt(60 * HOUR)
    assert all(gap <= LONGEST_S + 2 * STEP_S + 900.0 for gap in huge.gaps())
    assert len(huge.begun) >= 12
