"""Arms that alternate in one run, and what was measured: medians, spread, the ratio with a bound."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

Measured = dict[str, float]
"""One measurement of one arm: values by name, with units in the names."""


def alternate(
    arms: Mapping[str, Callable[[int], Measured]], pairs: int, *, warmups: int = 1
) -> dict[str, list[Measured]]:
    """Measure all arms ``pairs`` times, the order turned round each time; warm-ups are thrown away.

    An arm is called with the number of the pair, negative in a warm-up. What slows the machine for a while
    slows neighbours alike, and neither arm always comes second.
    """
    found: dict[str, list[Measured]] = {name: [] for name in arms}
    for pair in range(-warmups, pairs):
        for name in list(arms) if pair % 2 == 0 else reversed(list(arms)):
            measured = arms[name](pair)
            if pair >= 0:
                found[name].append(measured)
    return found


@dataclass(frozen=True)
class Spread:
    """A median and its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """From values; at least one."""
        low, median, high = (float(found) for found in np.quantile(np.asarray(values), (0.25, 0.5, 0.75)))
        return cls(median, low, high)

    def __str__(self) -> str:
        digits = 4 if abs(self.median) < 0.1 else 3
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


@dataclass(frozen=True)
class Comparison:
    """Ours beside a reference, measured in pairs."""

    name: str
    ours: Spread
    reference: Spread
    ratio: float
    """Of the medians."""
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
    """Compare values that were measured in pairs: ``ours[i]`` beside ``reference[i]``."""
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
    """One value of every measurement."""
    return [row[name] for row in rows]


def show(comparisons: Sequence[Comparison], *, reference: str, others: Mapping[str, Sequence[float]]) -> None:
    """The table, for people. ``others``: what was measured beside, without a ratio."""
    width = max(len(one) for one in (*(c.name for c in comparisons), *others, "median (quartiles)"))
    print(f"{'median (quartiles)':{width}} {'ours':>26} {reference:>26}   ratio (95%)")
    for one in comparisons:
        low, high = one.ratio_95
        told = f"{one.ratio:.3g} ({low:.3g} to {high:.3g})"
        if one.goal is not None:
            sign = "<=" if one.at_most else ">="
            told += f"  goal {sign} {one.goal:g}: {'reached' if one.met else 'NOT reached'}"
        print(f"{one.name:{width}} {one.ours!s:>26} {one.reference!s:>26}   {told}")
    for name, values in others.items():
        print(f"{name:{width}} {Spread.of(values)!s:>26}")


def write_json(path: Path, comparisons: Sequence[Comparison], **rest: Any) -> None:
    """All of it: ``comparisons`` with whether they were met, and whatever else there is to keep."""
    rows = [{**asdict(one), "met": one.met} for one in comparisons]
    path.write_text(json.dumps({"comparisons": rows, **rest}, indent=1, default=str) + "\n")
