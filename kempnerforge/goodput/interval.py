"""Optimal save intervals, and the estimated rate of interruptions."""

from __future__ import annotations

import math

RANK_S_PER_FAILURE = 50_000 * 3600.0
"""Rank-seconds per failure. The Llama 3 Herd of Models reports 419 failures in 54 days on 16,384
GPUs, which is one in 50,676 GPU-hours."""
LONGEST_PRIOR_S = 24 * 3600.0
"""Upper bound of the prior. Small jobs end by preemption, node failures and mistakes, not by GPU faults."""


def young(stall_s: float, mtti_s: float) -> float:
    """Return the seconds between saves by Young's formula (1974): sqrt(2 S M), for stall S and MTTI M."""
    return math.sqrt(2 * stall_s * mtti_s)


def daly(stall_s: float, mtti_s: float) -> float:
    """Return the seconds between saves by Daly's higher-order formula (2006); M if S is at least 2 M."""
    if stall_s >= 2 * mtti_s:
        return mtti_s
    ratio = stall_s / (2 * mtti_s)
    return young(stall_s, mtti_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall_s


def expected_overhead(
    interval_s: float, *, stall_s: float, mtti_s: float, lag_s: float = 0.0, restart_s: float = 0.0
) -> float:
    """Return the share of time that saving every ``interval_s`` is expected to cost.

    The cost consists of stalls, lost work and restarts. First-order model: 1 - (1 - (restart + lag
    + interval / 2) / MTTI) / (1 + stall / interval), at most 1. It holds while the interval is much
    shorter than the MTTI.

    Args:
        interval_s: time between two saves, without the stall.
        stall_s: time that training waits for one save.
        mtti_s: mean time to interruption.
        lag_s: time from the saved step to its commit.
        restart_s: time from an interruption to the next step.
    """
    useful = 1 - (restart_s + lag_s + interval_s / 2) / mtti_s
    return min(1.0, 1 - useful / (1 + stall_s / interval_s))


def prior_mtti(num_ranks: int) -> float:
    """Return the prior mean time to interruption in seconds, before a run has any history."""
    return min(RANK_S_PER_FAILURE / num_ranks, LONGEST_PRIOR_S)


def expected_mtti(failures: int, exposure_s: float, *, prior_s: float) -> float:
    """Return the mean time to interruption in seconds: (prior + exposure) / (1 + failures).

    Failures are Poisson distributed. The prior of their rate is a Gamma distribution with shape 1
    and rate ``prior_s``, equivalent to one failure in that time. The result is the inverse of the
    posterior mean (Gelman et al., Bayesian Data Analysis, 3rd ed., 2.6).
    """
    return (prior_s + exposure_s) / (1 + failures)


def rate_bounds(failures: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return exact bounds on the mean of a Poisson count that was observed as ``failures`` (Garwood 1936)."""
    tail = (1 - confidence) / 2
    low = 0.0 if failures == 0 else _solve(failures - 1, 1 - tail)
    return low, _solve(failures, tail)


def _solve(count: int, probability: float) -> float:
    """Return the mean at which a Poisson count is at most ``count`` with ``probability``."""
    low, high = 0.0, 2.0 * count + 20.0
    for _ in range(200):
        middle = (low + high) / 2
        below = sum(math.exp(k * math.log(middle) - middle - math.lgamma(k + 1)) for k in range(count + 1))
        low, high = (middle, high) if below > probability else (low, middle)
    return (low + high) / 2
