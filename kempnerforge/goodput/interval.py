"""How often to save, and how often this run is interrupted. Pure."""

from __future__ import annotations

import math

RANK_S_PER_FAILURE = 50_000 * 3600.0
"""A rank's time for one failure: 419 in 54 days on 16,384 GPUs are 50,676 h (The Llama 3 Herd of Models)."""
LONGEST_PRIOR_S = 24 * 3600.0
"""Small jobs are not ended by GPUs but by preemption, their nodes, and their own mistakes."""


def young(stall_s: float, mtti_s: float) -> float:
    """Seconds between saves by Young (1974): sqrt(2 S M)."""
    return math.sqrt(2 * stall_s * mtti_s)


def daly(stall_s: float, mtti_s: float) -> float:
    """Seconds between saves by Daly (2006), of higher order; the MTTI itself when a save costs twice that."""
    if stall_s >= 2 * mtti_s:
        return mtti_s
    ratio = stall_s / (2 * mtti_s)
    return young(stall_s, mtti_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall_s


def expected_overhead(
    interval_s: float, *, stall_s: float, mtti_s: float, lag_s: float = 0.0, restart_s: float = 0.0
) -> float:
    """Share of the time that saving every ``interval_s`` is expected to cost: stalls, lost work, restarts.

    1 - (1 - (restart + lag + interval / 2) / MTTI) / (1 + stall / interval), to first order: good while an
    interval is much shorter than the MTTI, and 1 at most.

    Args:
        interval_s: from one save to the next, the stall left out.
        stall_s: for how long training waits for one save.
        mtti_s: mean time to interrupt.
        lag_s: from the step that is saved to its commit.
        restart_s: from an interrupt to the first step after it.
    """
    useful = 1 - (restart_s + lag_s + interval_s / 2) / mtti_s
    return min(1.0, 1 - useful / (1 + stall_s / interval_s))


def prior_mtti(num_ranks: int) -> float:
    """Mean seconds to an interruption to reckon with before anything is known of a run."""
    return min(RANK_S_PER_FAILURE / num_ranks, LONGEST_PRIOR_S)


def expected_mtti(failures: int, exposure_s: float, *, prior_s: float) -> float:
    """Mean seconds to an interruption: (prior + exposure) / (1 + failures).

    Failures are Poisson with a rate that is Gamma distributed with shape 1 and rate ``prior_s``, which is
    worth one failure seen in that time; this is one over the mean of the posterior (Gelman et al., Bayesian
    Data Analysis, 3rd ed., 2.6).
    """
    return (prior_s + exposure_s) / (1 + failures)


def rate_bounds(failures: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Exact bounds on the mean of a Poisson count that came out as ``failures`` (Garwood 1936)."""
    tail = (1 - confidence) / 2
    low = 0.0 if failures == 0 else _solve(failures - 1, 1 - tail)
    return low, _solve(failures, tail)


def _solve(count: int, probability: float) -> float:
    """The mean at which a Poisson count is at most ``count`` with ``probability``."""
    low, high = 0.0, 2.0 * count + 20.0
    for _ in range(200):
        middle = (low + high) / 2
        below = sum(math.exp(k * math.log(middle) - middle - math.lgamma(k + 1)) for k in range(count + 1))
        low, high = (middle, high) if below > probability else (low, middle)
    return (low + high) / 2
