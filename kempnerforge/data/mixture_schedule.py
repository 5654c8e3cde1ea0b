"""Whose turn it is: the source of each position of a phase, by integer weights.

After any number of positions the count of each source is less than one away from its exact share,
position x weight / sum of the weights (the chairman assignment problem: Tijdeman, Discrete
Mathematics 32, 1980). The schedule repeats after as many positions as the weights sum to, once they
are divided by their greatest common divisor.

Turn ``j`` (from 0) of a source with share ``w`` must begin at position ``floor(j / w)`` or later and
end before ``ceil((j + 1) / w)``: this is the condition above, restated. The earliest deadline among
the turns that may begin is always next. For turns of equal length this meets all deadlines if any
schedule does, and one exists, because the shares of all turns that compete for a position sum to 1
(proportionate fairness: Baruah, Cohen, Plaxton and Varvel, Algorithmica 15, 1996).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from heapq import heappop, heappush, heappushpop

import numpy as np

SCHEDULE_NAME = "earliest-deadline"
"""Name of the algorithm, stored in the data fingerprint. Change it when the same weights give another
schedule."""

_CHUNK = 1 << 16


class Schedule:
    """The sources of the first ``length`` positions of a phase, or of all positions without a length.

    ``weights`` are integers of at least 0, with a sum above 0. Use :func:`schedule` to create it.
    """

    def __init__(self, weights: tuple[int, ...], length: int | None) -> None:
        divisor = math.gcd(*weights)
        self._weights = np.array([weight // divisor for weight in weights], dtype=np.int64)
        self._period = int(self._weights.sum())
        self._order = _turns(self._weights, self._period if length is None else min(self._period, length))
        num_sources = len(weights)
        self._before = np.empty(self._order.size, dtype=np.int32)
        self._places = [
            np.flatnonzero(self._order == source).astype(np.int32) for source in range(num_sources)
        ]
        for places in self._places:
            self._before[places] = np.arange(places.size, dtype=np.int32)

    def turns_at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the source at each of ``positions``, and how many turns it had before, all int64 [N]."""
        rounds, places = np.divmod(positions, self._period)
        sources = self._order[places].astype(np.int64)
        return sources, rounds * self._weights[sources] + self._before[places]

    def counts(self, position: int) -> np.ndarray:
        """Return how many of the positions before ``position`` each source has, int64 [sources]."""
        rounds, place = divmod(position, self._period)
        return rounds * self._weights + [np.searchsorted(places, place) for places in self._places]

    def position_of(self, source: int, turn: int) -> int | None:
        """Return the position of a turn (from 0) of a source. None if it has no turns at all."""
        if self._weights[source] == 0:
            return None
        rounds, number = divmod(turn, int(self._weights[source]))
        places = self._places[source]
        # Behind the end of a schedule of a limited length, any position is as good.
        place = int(places[number]) if number < places.size else self._order.size
        return rounds * self._period + place


@functools.lru_cache(maxsize=16)
def schedule(weights: tuple[int, ...], length: int | None = None) -> Schedule:
    """Return the schedule of a phase, computed once. A million positions take about half a second."""
    return Schedule(weights, length)


@functools.lru_cache(maxsize=4096)
def turns_of_phase(weights: tuple[int, ...], length: int) -> tuple[int, ...]:
    """Return how many of the ``length`` positions of a phase each source has, computed once.

    The schedules of many phases do not fit in the memory of ``schedule``, but these numbers do.
    """
    return tuple(schedule(weights, length).counts(length).tolist())


def _turns(weights: np.ndarray, length: int) -> np.ndarray:
    """Return the source of each of the first ``length`` positions of a period, uint16 or uint32."""
    keys, num_ready = _jobs(weights, length)
    turns = np.fromiter(_earliest_deadlines(keys, num_ready), dtype=np.int64, count=length)
    return (turns % weights.size).astype(np.min_scalar_type(weights.size))


def _jobs(weights: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return each turn as deadline x sources + source, in the order in which they may begin, and how
    many of them may begin at each position or earlier, int64 [length]."""
    period, num_sources = int(weights.sum()), weights.size
    starts, keys = [], []
    for source, weight in enumerate(weights.tolist()):
        turn = np.arange(min(weight, weight * length // period + 1), dtype=np.int64)
        starts.append(turn * period // max(weight, 1))
        keys.append(-(-(turn + 1) * period // max(weight, 1)) * num_sources + source)
    all_starts = np.concatenate(starts)
    order = np.argsort(all_starts, kind="stable")
    ready = np.searchsorted(all_starts[order], np.arange(length), side="right")
    return np.concatenate(keys)[order], ready


def _earliest_deadlines(keys: np.ndarray, num_ready: np.ndarray) -> Iterator[int]:
    """Yield the turn of each position: the smallest key of those that may begin and had no turn yet."""
    heap: list[int] = []
    done = 0
    for first in range(0, num_ready.size, _CHUNK):
        ready = num_ready[first : first + _CHUNK]
        offset, new = done, keys[done : ready[-1]].tolist()
        for end in ready.tolist():
            if end == done + 1:
                yield heappushpop(heap, new[done - offset])
                done = end
                continue
            while done < end:
                heappush(heap, new[done - offset])
                done += 1
            yield heappop(heap)
