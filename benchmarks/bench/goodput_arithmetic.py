"""The parts of the time of a killed job, as measured from outside the job, and a model that predicts them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.kills import Attempt
from kempnerforge.goodput.interval import daly

PARTS = ("steps", "saving", "redo", "restart", "ending", "delay")
"""``steps``: the time of the steps without kills. ``saving``: what kept steps took beyond that,
which includes slower steps during a save, and noise. ``redo``: from the last kept step to the kill.
``restart``: from a launch to its first step. ``ending``: from the last step to the end of the last
process. ``delay``: between attempts."""


@dataclass(frozen=True)
class Cost:
    """The costs of an arm, measured in an undisturbed run."""

    step_s: float
    """Mean time of the steps without a save in progress."""
    stall_s: float
    """Time that the steps took beyond ``step_s``, per save."""
    blocking_s: float
    """Median blocking time of a save, as measured by the loop."""
    lag_s: float
    """Median time from the end of blocking until a save is durable."""
    restart_s: float
    """Time from the launch to the first step."""


def cost_of(attempt: Attempt, *, blocking_is_lag: bool) -> Cost:
    """Return the costs that an undisturbed run shows, without its last step and the save after it.

    ``blocking_is_lag`` says that a save is already durable when the loop continues.
    """
    saves = [save for save in attempt.saves if save["step"] != attempt.last_step]
    clean_s = clean_steps_s(attempt)
    if not clean_s or not saves:
        raise ValueError(
            "an undisturbed run needs saves before its end, and steps without a save in progress"
        )
    step_s = statistics.fmean(clean_s)
    blocking_s = statistics.median(save["blocking_s"] for save in saves)
    lag_s = 0.0 if blocking_is_lag else statistics.median(_lag(save) for save in saves)
    total_s = attempt.steps[-1][0] - attempt.steps[0][0]
    excess_s = (total_s - step_s * (len(attempt.steps) - 1)) / len(saves)
    restart_s = attempt.steps[0][0] - attempt.launched - step_s
    return Cost(step_s, max(excess_s, blocking_s), blocking_s, lag_s, restart_s)


def clean_steps_s(attempt: Attempt) -> list[float]:
    """Return the seconds of each step without a save in progress, except the first of the attempt."""
    times = {step: seen for seen, step, _ in attempt.steps}
    saves = [(times[save["step"]], save["seen"]) for save in attempt.saves if save["step"] in times]
    spans = [(times[step - 1], times[step]) for step in sorted(times)[1:]]
    return [
        end - begin for begin, end in spans if not any(begin < over and since < end for since, over in saves)
    ]


def _lag(save: dict[str, Any]) -> float:
    return max(0.0, save["total_s"] - save["blocking_s"])


def parts_of(attempts: Sequence[Attempt], *, step_s: float) -> dict[str, float]:
    """Return the seconds by part of a finished job. They sum to the time from first launch to end."""
    parts: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    for number, attempt in enumerate(attempts):
        if number:
            parts["delay"] += attempt.launched - attempts[number - 1].ended
        if not attempt.steps:
            parts["restart"] += attempt.ended - attempt.launched
            continue
        kept = kept_to(attempts, number)
        times = {step: seen for seen, step, _ in attempt.steps}
        began = max(attempt.launched, attempt.steps[0][0] - step_s)
        until = times.get(kept, began)
        parts["restart"] += began - attempt.launched
        steps_s = step_s * sum(step <= kept for step in times)
        parts["steps"] += steps_s
        parts["saving"] += until - began - steps_s
        parts["redo" if attempt.killed_after_s is not None else "ending"] += attempt.ended - until
    return parts


def kept_to(attempts: Sequence[Attempt], number: int) -> int:
    """Return the last step of an attempt that no later attempt repeated.

    The attempt must have completed a step.
    """
    later = [attempt.began_at for attempt in attempts[number + 1 :] if attempt.began_at is not None]
    last = attempts[number].last_step
    assert last is not None
    return min([last, *later])


def lost_steps(attempts: Sequence[Attempt]) -> int:
    """Return the number of steps that were done again."""
    done = sum(len(attempt.steps) for attempt in attempts)
    return done - max((attempt.last_step or 0 for attempt in attempts), default=0)


def lost_committed_steps(attempts: Sequence[Attempt]) -> int:
    """Return the number of steps that were lost although they were committed. The benchmark requires 0."""
    return sum(
        max(0, attempt.newest_before - attempt.began_at)
        for attempt in attempts
        if attempt.began_at is not None
    )


def wrong_losses(attempts: Sequence[Attempt], undisturbed: Attempt) -> list[int]:
    """Return steps whose loss, in any attempt, differs in any bit from the undisturbed run or is missing."""
    expected = {step: loss for _, step, loss in undisturbed.steps}
    seen = [(step, loss) for attempt in attempts for _, step, loss in attempt.steps]
    wrong = {step for step, loss in seen if expected.get(step) != loss}
    return sorted(wrong | (expected.keys() - {step for step, _ in seen}))


def first_order_ratio(cost: Cost, *, interval_s: float, mtti_s: float, delay_s: float) -> float:
    """Return the effective time ratio: (1 - (restart + lag + interval / 2) / mtti) / (1 + stall / interval).

    ``interval_s`` is the work between saves. ``mtti_s`` counts time while the job is up.
    ``delay_s`` follows each kill.
    """
    lost_s = cost.restart_s + delay_s + cost.lag_s + interval_s / 2
    return max(0.0, 1 - lost_s / (mtti_s + delay_s)) / (1 + cost.stall_s / interval_s)


def exponential_ratio(cost: Cost, *, interval_s: float, mtti_s: float, delay_s: float) -> float:
    """Return the exact effective time ratio for exponential gaps between kills (Daly 2006, eq. 20).

    An attempt commits its k-th interval if it lives for restart + k (interval + stall) + lag, so it
    keeps interval x exp(-(restart + lag) / mtti) / (exp((interval + stall) / mtti) - 1) on
    average.
    """
    alive = math.exp(-(cost.restart_s + cost.lag_s) / mtti_s)
    kept_s = interval_s * alive / math.expm1((interval_s + cost.stall_s) / mtti_s)
    return kept_s / (mtti_s + delay_s)


def best_interval_s(cost: Cost, mtti_s: float) -> float:
    """Return Daly's interval for the cost of a save, but at least the time until a save is durable."""
    return max(daly(cost.stall_s, mtti_s), cost.blocking_s + cost.lag_s)


def projected_ratio(cost: Cost, *, scale: float, restart_s: float, mtti_s: float) -> float:
    """Return the model's ratio, at the best interval, for a save with ``scale`` times the cost and lag."""
    larger = replace(
        cost,
        stall_s=scale * cost.stall_s,
        blocking_s=scale * cost.blocking_s,
        lag_s=scale * cost.lag_s,
        restart_s=restart_s,
    )
    interval_s = best_interval_s(larger, mtti_s)
    return exponential_ratio(larger, interval_s=interval_s, mtti_s=mtti_s, delay_s=0.0)
