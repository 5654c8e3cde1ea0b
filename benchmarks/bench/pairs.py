"""Alternate arms in one run and summarize them: medians, spread, the ratio with its bounds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

Measured = dict[str, float]
"""One measurement of one arm: values by name. Names contain the unit."""


def alternate(
    arms: Mapping[str, Callable[[int], Measured]], pairs: int, *, warmups: int = 1
) -> dict[str, list[Measured]]:
    """Measure all arms ``pairs`` times, in alternating order. Warm-ups are discarded.

    An arm is called with the number of the pair, which is negative in a warm-up. A temporary
    slowdown of the machine thus affects neighbouring measurements alike, and no arm is always
    second.
    """
    measurements: dict[str, list[Measured]] = {name: [] for name in arms}
    for pair in range(-warmups, pairs):
        for name in list(arms) if pair % 2 == 0 else reversed(list(arms)):
            measured = arms[name](pair)
            if pair >= 0:
                measurements[name].append(measured)
    return measurements


@dataclass(frozen=True)
class Spread:
    """A median and its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Compute the median and quartiles of ``values``, at least one."""
        low, median, high = (float(value) for value in np.quantile(np.asarray(values), (0.25, 0.5, 0.75)))
        return cls(median, low, high)

    def __str__(self) -> str:
        digits = 4 if abs(self.median) < 0.1 else 3
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


@dataclass(frozen=True)
class Comparison:
    """The comparison of ours with a reference, measured in pairs."""

    name: str
    ours: Spread
    reference: Spread
    ratio: float
    """The ratio of the medians."""
    ratio_95: tuple[float, float]
    """Bootstrap bounds: pairs drawn with replacement (Efron 1979), percentiles 2.5 and 97.5."""
    goal: float | None = None
    """The ratio to reach."""
    at_most: bool = True

    @property
    def met(self) -> bool | None:
        """Whether the ratio reaches the goal."""
        if self.goal is None:
            return None
        return self.ratio <= self.goal if self.at_most else self.ratio >= self.goal


def compare(
    name: str,
    ours: Sequence[float],
    reference: Sequence[float],
    *,
    goal: float | None = None,
    at_most: bool = True,
    draws: int = 4000,
) -> Comparison:
    """Compare values that were measured in pairs: ``ours[i]`` with ``reference[i]``."""
    pairs = np.array([ours, reference], dtype=float)
    chosen = np.random.default_rng(0).integers(pairs.shape[1], size=(draws, pairs.shape[1]))
    medians = np.median(pairs[:, chosen], axis=2)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = medians[0] / medians[1]
        ratio = np.median(pairs[0]) / np.median(pairs[1])
        low, high = np.quantile(ratios, (0.025, 0.975))
    spreads = (Spread.of(ours), Spread.of(reference))
    return Comparison(name, *spreads, float(ratio), (float(low), float(high)), goal, at_most)


def column(rows: Sequence[Measured], name: str) -> list[float]:
    """Return one value of every measurement."""
    return [row[name] for row in rows]


def show(comparisons: Sequence[Comparison], *, reference: str, others: Mapping[str, Sequence[float]]) -> None:
    """Print the table. ``others`` are measurements without a ratio."""
    width = max(len(name) for name in (*(c.name for c in comparisons), *others, "median (quartiles)"))
    print(f"{'median (quartiles)':{width}} {'ours':>26} {reference:>26}   ratio (95%)")
    for row in comparisons:
        low, high = row.ratio_95
        ratio = f"{row.ratio:.3g} ({low:.3g} to {high:.3g})"
        if row.goal is not None:
            sign = "<=" if row.at_most else ">="
            ratio += f"  goal {sign} {row.goal:g}: {'reached' if row.met else 'NOT reached'}"
        print(f"{row.name:{width}} {row.ours!s:>26} {row.reference!s:>26}   {ratio}")
    for name, values in others.items():
        print(f"{name:{width}} {Spread.of(values)!s:>26}")


def write_json(path: Path, comparisons: Sequence[Comparison], **rest: Any) -> None:
    """Write ``comparisons``, with whether their goals were met, and ``rest``."""
    rows = [{**asdict(row), "met": row.met} for row in comparisons]
    path.write_text(json.dumps({"comparisons": rows, **rest}, indent=1, default=str) + "\n")
