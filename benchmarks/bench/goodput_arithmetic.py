"""Where the time of a job that was killed went, as seen from outside, and what a model says of it. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.kills import Attempt
from kempnerforge.goodput.interval import daly

PARTS = ("steps", "saving", "redo", "restart", "ending", "delay")
"""``steps``: what they take undisturbed. ``saving``: what kept steps took beyond that, so slower steps
beside a save are in it, and noise. ``redo``: from the last step that was kept to the kill. ``restart``: from
a launch to its first step. ``ending``: from the last step to the end of the last process. ``delay``: between
attempts."""


@dataclass(frozen=True)
class Cost:
    """What an arm costs, measured in an undisturbed run."""

    step_s: float
    """Mean of the steps that no save was beside."""
    stall_s: float
    """A save's: all that the steps took beyond ``step_s``, divided by the number of saves."""
    blocking_s: float
    """A save's, as the loop itself measured it; the median."""
    lag_s: float
    """From the end of blocking to durable; the median."""
    restart_s: float
    """From the launch to the first step."""


def cost_of(attempt: Attempt, *, blocking_is_lag: bool) -> Cost:
    """The costs that an undisturbed run shows. Its last step and the save after it are left out.

    ``blocking_is_lag``: a save is durable when the loop goes on.
    """
    saves = [save for save in attempt.saves if save["step"] != attempt.last_step]
    clean_s = clean_steps_s(attempt)
    if not clean_s or not saves:
        raise ValueError("an undisturbed run needs saves before its end, and steps that no save is beside")
    step_s = statistics.fmean(clean_s)
    blocking_s = statistics.median(save["blocking_s"] for save in saves)
    lag_s = 0.0 if blocking_is_lag else statistics.median(_lag(save) for save in saves)
    total_s = attempt.steps[-1][0] - attempt.steps[0][0]
    excess_s = (total_s - step_s * (len(attempt.steps) - 1)) / len(saves)
    restart_s = attempt.steps[0][0] - attempt.launched - step_s
    return Cost(step_s, max(excess_s, blocking_s), blocking_s, lag_s, restart_s)


def clean_steps_s(attempt: Attempt) -> list[float]:
    """Seconds of each step that no save was beside; the first of the attempt is left out."""
    times = {step: seen for seen, step, _ in attempt.steps}
    saves = [(times[save["step"]], save["seen"]) for save in attempt.saves if save["step"] in times]
    spans = [(times[step - 1], times[step]) for step in sorted(times)[1:]]
    return [
        end - begin for begin, end in spans if not any(begin < over and since < end for since, over in saves)
    ]


def _lag(save: dict[str, Any]) -> float:
    return max(0.0, save["total_s"] - save["blocking_s"])


def parts_of(attempts: Sequence[Attempt], *, step_s: float) -> dict[str, float]:
    """Seconds by part, of a job that was done; they sum to the time from its first launch to its end."""
    parts: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    for place, one in enumerate(attempts):
        if place:
            parts["delay"] += one.launched - attempts[place - 1].ended
        if not one.steps:
            parts["restart"] += one.ended - one.launched
            continue
        kept = kept_to(attempts, place)
        times = {step: seen for seen, step, _ in one.steps}
        began = max(one.launched, one.steps[0][0] - step_s)
        until = times.get(kept, began)
        parts["restart"] += began - one.launched
        steps_s = step_s * sum(step <= kept for step in times)
        parts["steps"] += steps_s
        parts["saving"] += until - began - steps_s
        parts["redo" if one.killed_after_s is not None else "ending"] += one.ended - until
    return parts


def kept_to(attempts: Sequence[Attempt], place: int) -> int:
    """The last step of an attempt, which did some, that no later one did again."""
    later = [one.began_at for one in attempts[place + 1 :] if one.began_at is not None]
    last = attempts[place].last_step
    assert last is not None
    return min([last, *later])


def lost_steps(attempts: Sequence[Attempt]) -> int:
    """Steps that were done again."""
    done = sum(len(one.steps) for one in attempts)
    return done - max((one.last_step or 0 for one in attempts), default=0)


def lost_committed_steps(attempts: Sequence[Attempt]) -> int:
    """Steps that were lost although they could have been gone on from: of this there must be none."""
    return sum(max(0, one.newest_before - one.began_at) for one in attempts if one.began_at is not None)


def wrong_losses(attempts: Sequence[Attempt], undisturbed: Attempt) -> list[int]:
    """Steps whose loss, in any attempt, does not have the bits of the undisturbed run; missing ones too."""
    expected = {step: loss for _, step, loss in undisturbed.steps}
    found = [(step, loss) for one in attempts for _, step, loss in one.steps]
    wrong = {step for step, loss in found if expected.get(step) != loss}
    return sorted(wrong | (expected.keys() - {step for step, _ in found}))


def first_order_ratio(cost: Cost, *, interval_s: float, mtti_s: float, delay_s: float) -> float:
    """Effective time ratio: (1 - (restart + lag + interval / 2) / mtti) / (1 + stall / interval).

    ``interval_s`` is work between saves. ``mtti_s`` counts time while the job is up; ``delay_s`` follow a
    kill.
    """
    lost_s = cost.restart_s + delay_s + cost.lag_s + interval_s / 2
    return max(0.0, 1 - lost_s / (mtti_s + delay_s)) / (1 + cost.stall_s / interval_s)


def exponential_ratio(cost: Cost, *, interval_s: float, mtti_s: float, delay_s: float) -> float:
    """The same without the approximation, for kills whose gaps are exponential (Daly 2006, eq. 20).

    An attempt commits its k-th interval when it lives for restart + k (interval + stall) + lag, so it keeps
    interval x exp(-(restart + lag) / mtti) / (exp((interval + stall) / mtti) - 1) on average.
    """
    alive = math.exp(-(cost.restart_s + cost.lag_s) / mtti_s)
    kept_s = interval_s * alive / math.expm1((interval_s + cost.stall_s) / mtti_s)
    return kept_s / (mtti_s + delay_s)


def best_interval_s(cost: Cost, mtti_s: float) -> float:
    """Daly's interval for what a save costs; no shorter than a save takes until it is durable."""
    return max(daly(cost.stall_s, mtti_s), cost.blocking_s + cost.lag_s)


def projected_ratio(cost: Cost, *, scale: float, restart_s: float, mtti_s: float) -> float:
    """The model's ratio for a save that costs, and lags, ``scale`` times as much, at its best interval."""
    larger = replace(
        cost,
        stall_s=scale * cost.stall_s,
        blocking_s=scale * cost.blocking_s,
        lag_s=scale * cost.lag_s,
        restart_s=restart_s,
    )
    interval_s = best_interval_s(larger, mtti_s)
    return exponential_ratio(larger, interval_s=interval_s, mtti_s=mtti_s, delay_s=0.0)
