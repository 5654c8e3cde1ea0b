"""What a run did when: stretches of wall time, from the attempts that ``accounting.account`` gives. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KINDS = ("idle", "setup", "load", "training", "lost")
"""``lost``: training that a later attempt did again."""


@dataclass(frozen=True)
class Segment:
    """One of ``KINDS``; times are seconds after the run began."""

    attempt: int
    kind: str
    began: float
    ended: float


def find_segments(attempts: Sequence[Mapping[str, Any]]) -> list[Segment]:
    """All stretches, in order; idle time belongs to the attempt after it. Empty ones are left out."""
    found: list[Segment] = []
    origin = attempts[0]["started"] if attempts else 0.0
    before = origin
    for one in attempts:
        started, ended = one["started"], one["started"] + one["wall_s"]
        resumed = ended if one["resumed"] is None else one["resumed"]
        lost_from = ended if one["lost_from"] is None else one["lost_from"]
        loads_from = max(started, resumed - one["parts_s"]["load"])
        edges = [before, started, loads_from, resumed, max(resumed, lost_from), ended]
        found += [
            Segment(one["attempt"], kind, began - origin, end - origin)
            for kind, (began, end) in zip(KINDS, itertools.pairwise(edges), strict=True)
            if end > began
        ]
        before = ended
    return found


def rasterize(found: Sequence[Segment], *, wall_s: float, columns: int) -> list[tuple[int, int, str]]:
    """The run on one line of ``columns`` cells: runs of (first cell, cell after the last, kind).

    A cell has the kind that fills most of it, so however many stretches there are, the drawing stays small.
    """
    width = wall_s / columns
    shares: list[dict[str, float]] = [{} for _ in range(columns)]
    for one in found:
        first, last = int(one.began / width), min(int(one.ended / width), columns - 1)
        for cell in range(first, last + 1):
            inside = min(one.ended, (cell + 1) * width) - max(one.began, cell * width)
            shares[cell][one.kind] = shares[cell].get(one.kind, 0.0) + inside
    runs: list[tuple[int, int, str]] = []
    for cell, share in enumerate(shares):
        if not share:
            continue
        kind = max(share, key=lambda each: share[each])
        if runs and runs[-1][1:] == (cell, kind):
            runs[-1] = (runs[-1][0], cell + 1, kind)
        else:
            runs.append((cell, cell + 1, kind))
    return runs
