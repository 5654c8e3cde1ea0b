"""Divide the wall time of a run into segments, from the attempts that ``accounting.account`` returns."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KINDS = ("idle", "setup", "load", "training", "lost")
"""``lost``: training that a later attempt repeated."""


@dataclass(frozen=True)
class Segment:
    """A period of one of ``KINDS``. Times are seconds after the start of the run."""

    attempt: int
    kind: str
    began: float
    ended: float


def find_segments(attempts: Sequence[Mapping[str, Any]]) -> list[Segment]:
    """Return all nonempty segments in order. Idle time belongs to the attempt after it."""
    segments: list[Segment] = []
    origin = attempts[0]["started"] if attempts else 0.0
    before = origin
    for attempt in attempts:
        started, ended = attempt["started"], attempt["started"] + attempt["wall_s"]
        resumed = ended if attempt["resumed"] is None else attempt["resumed"]
        lost_from = ended if attempt["lost_from"] is None else attempt["lost_from"]
        loads_from = max(started, resumed - attempt["parts_s"]["load"])
        edges = [before, started, loads_from, resumed, max(resumed, lost_from), ended]
        segments += [
            Segment(attempt["attempt"], kind, began - origin, end - origin)
            for kind, (began, end) in zip(KINDS, itertools.pairwise(edges), strict=True)
            if end > began
        ]
        before = ended
    return segments


def rasterize(segments: Sequence[Segment], *, wall_s: float, columns: int) -> list[tuple[int, int, str]]:
    """Draw the run on one line of ``columns`` cells, as runs of (first cell, cell after the last, kind).

    A cell has the kind that takes most of it, so the drawing is small however many segments there
    are.
    """
    width = wall_s / columns
    shares: list[dict[str, float]] = [{} for _ in range(columns)]
    for segment in segments:
        first, last = int(segment.began / width), min(int(segment.ended / width), columns - 1)
        for cell in range(first, last + 1):
            inside = min(segment.ended, (cell + 1) * width) - max(segment.began, cell * width)
            shares[cell][segment.kind] = shares[cell].get(segment.kind, 0.0) + inside
    runs: list[tuple[int, int, str]] = []
    for cell, share in enumerate(shares):
        if not share:
            continue
        kind = max(share, key=lambda name: share[name])
        if runs and runs[-1][1:] == (cell, kind):
            runs[-1] = (runs[-1][0], cell + 1, kind)
        else:
            runs.append((cell, cell + 1, kind))
    return runs
