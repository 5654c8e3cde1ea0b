"""The overhead of a save: tables of intervals and what they come to. No clock."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kempnerforge.checkpoint.schedule.overhead import (
    BASELINE_INTERVALS,
    BASELINE_WINDOW,
    SAVES_WINDOW,
    WARM_UP_INTERVALS,
    OverheadMeter,
    SaveCost,
    cost_s,
)

STEP_S = 2.0
COLD = WARM_UP_INTERVALS + BASELINE_INTERVALS


def warm(steps: Sequence[float] = (STEP_S,) * COLD) -> OverheadMeter:
    """A meter that has seen these quiet steps."""
    meter = OverheadMeter()
    for seconds in steps:
        meter.step_end(1, seconds)
    return meter


def save(meter: OverheadMeter, *beside: float, call_s: float = 0.0, durable_s: float = 1.0) -> SaveCost:
    """A save that begins now, stands still for ``call_s``, and is known at the end of these intervals."""
    meter.save_begins()
    meter.add_blocking_time(call_s)
    for seconds in beside:
        meter.step_end(1, seconds)
    return meter.save_ended(durable_s=durable_s, at_boundary=bool(beside))


TABLE: list[tuple[str, tuple[float, ...], float, float]] = [
    # what, seconds of the steps beside the save, of the call, overhead
    ("the call alone", (2.5,), 0.5, 0.5),
    ("steps that are slowed, and a call that returns at once", (3.0, 3.0, 2.5), 0.0, 2.5),
    ("both", (3.5, 3.0), 0.5, 2.5),
    ("noise: quicker beside it than otherwise", (1.75, 2.0), 0.0, -0.25),
    ("many steps, none slowed", (2.0,) * 40, 0.0, 0.0),
]


@pytest.mark.parametrize(("what", "beside", "call_s", "overhead_s"), TABLE)
def test_overhead_is_extra_time_of_steps_beside_save(
    what: str, beside: tuple[float, ...], call_s: float, overhead_s: float
) -> None:
    meter = warm()
    found = save(meter, *beside, call_s=call_s)
    assert found.overhead_s == pytest.approx(overhead_s), what
    assert found.blocked_s == call_s
    assert not found.is_lower_bound
    for _ in range(5):
        meter.step_end(1, STEP_S)
    assert meter.sum_s == pytest.approx(overhead_s), "quiet steps cost nothing"
    assert meter.measured == [found]


def test_overhead_blocking_save_charged_at_interval_end() -> None:
    meter = warm()
    found = save(meter, call_s=0.7)
    assert found.overhead_s == pytest.approx(0.7)
    assert meter.sum_s == pytest.approx(0.7), "before the step has ended, the call is what is known"
    meter.step_end(1, STEP_S + 1.0)  # the call, and caches that were cold behind it
    assert found.overhead_s == pytest.approx(1.0)
    meter.step_end(1, STEP_S)
    assert meter.sum_s == pytest.approx(1.0), "the next step is quiet"


def test_overhead_wait_before_optimizer_counted_once() -> None:
    meter = warm()
    meter.save_begins()
    meter.add_blocking_time(0.1)
    meter.add_blocking_time(0.4)
    meter.step_end(1, STEP_S + 0.5)
    assert meter.save_ended(durable_s=1.0, at_boundary=True).overhead_s == pytest.approx(0.5)


def test_overhead_without_quiet_steps_is_lower_bound() -> None:
    """Without quiet steps only standing still is counted, and the result says so."""
    meter = OverheadMeter()
    for _ in range(30):
        found = save(meter, 9.0, call_s=0.5)  # back to back: no step is ever quiet
        assert found.overhead_s == pytest.approx(0.5)
        assert found.is_lower_bound
    assert meter.sum_s == pytest.approx(15.0)
    assert meter.measured == []
    assert not meter.tried, "nothing could have been measured"
    assert save(OverheadMeter(), call_s=0.5).is_lower_bound


def test_overhead_first_steps_not_charged_to_save() -> None:
    meter = OverheadMeter()
    found = save(meter, 60.0, call_s=0.25)  # compiling
    assert (found.overhead_s, found.is_lower_bound) == (0.25, True)
    for seconds in (30.0,) * (WARM_UP_INTERVALS - 1) + (STEP_S,) * (BASELINE_INTERVALS - 1):
        meter.step_end(1, seconds)
        assert meter.baseline_step_s is None
    meter.step_end(1, STEP_S)
    assert meter.baseline_step_s == STEP_S


def test_overhead_validation_left_out() -> None:
    meter = warm()
    meter.exclude_time(100.0)
    meter.step_end(1, STEP_S + 100.0)
    assert meter.baseline_step_s == STEP_S
    meter.save_begins()
    meter.exclude_time(50.0)
    meter.step_end(1, STEP_S + 50.5)
    assert meter.save_ended(durable_s=1.0, at_boundary=True).overhead_s == pytest.approx(0.5)


def test_overhead_failed_save_counted_not_predictive() -> None:
    meter = warm()
    assert save(meter, STEP_S + 3.0, durable_s=0.0).overhead_s == pytest.approx(3.0)
    assert meter.sum_s == pytest.approx(3.0)
    assert meter.measured == []
    assert meter.tried


def test_overhead_two_saves_in_interval_charged_once() -> None:
    """As when a final save first waits for the one before it."""
    meter = warm()
    first = save(meter, call_s=0.5)
    second = save(meter, call_s=0.25)
    meter.step_end(1, STEP_S + 1.0)
    assert first.overhead_s == pytest.approx(0.5)
    assert second.overhead_s == pytest.approx(0.5)
    assert meter.sum_s == pytest.approx(1.0)


def test_overhead_quiet_step_is_median_of_newest() -> None:
    meter = warm((STEP_S,) * 100)
    for _ in range(BASELINE_WINDOW // 2 + 1):
        meter.step_end(1, 3 * STEP_S)
    assert meter.baseline_step_s == 3 * STEP_S
    meter.step_end(4, 4 * STEP_S)
    assert meter.baseline_step_s == 3 * STEP_S, "one that covers several steps is one measurement of a step"
    assert warm((STEP_S,) * COLD + (500.0,)).baseline_step_s == STEP_S, "one stall moves no median"


def test_overhead_several_or_no_steps_per_boundary() -> None:
    meter = warm()
    meter.save_begins()
    meter.step_end(3, 3 * STEP_S + 1.5)
    assert meter.save_ended(durable_s=1.0, at_boundary=True).overhead_s == pytest.approx(1.5)
    meter.step_end(0, 77.0)  # the agreement before the first step
    assert (meter.baseline_step_s, meter.sum_s) == (STEP_S, pytest.approx(1.5))


def test_overhead_cost_is_mean_of_newest_saves() -> None:
    """The mean of the newest saves, and at least what they stood still."""
    assert cost_s([]) is None
    assert cost_s([SaveCost(ended_s=extra_s) for extra_s in (1.0, -0.5, 2.5)]) == pytest.approx(1.0)
    assert cost_s([SaveCost(ended_s=-1.0, blocked_s=0.25)] * 2) == pytest.approx(0.25)
    meter = warm((STEP_S,) * 40)
    for extra_s in (100.0,) + (1.0,) * SAVES_WINDOW:
        save(meter, STEP_S + extra_s)
        meter.step_end(1, STEP_S)
    assert cost_s(meter.measured) == pytest.approx(1.0)
    assert meter.sum_s == pytest.approx(100.0 + SAVES_WINDOW)


@given(
    st.lists(
        st.tuples(st.floats(0.5, 4.0), st.sampled_from(["quiet", "begin", "end", "both"])),
        min_size=0,
        max_size=60,
    )
)
def test_overhead_sum_equals_sum_of_saves(events: list[tuple[float, str]]) -> None:
    meter, saves, pending = warm(), [], False
    for seconds, what in events:
        if what in ("begin", "both") and not pending:
            meter.save_begins()
            meter.add_blocking_time(0.1)
            pending = True
        meter.step_end(1, seconds)
        if what in ("end", "both") and pending:
            saves.append(meter.save_ended(durable_s=1.0, at_boundary=True))
            pending = False
    if pending:
        saves.append(meter.save_ended(durable_s=1.0, at_boundary=True))
    assert meter.sum_s == pytest.approx(sum(one.overhead_s for one in saves), abs=1e-9)
