"""Choose which of the possible outcomes of a crash are tried."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from typing import Any

from support.crash.disk_model import VARIANTS, Choice, Folder, Unit


def make_choice(
    units: list[Unit], there: frozenset[int], variant: Mapping[int, str], *, lose: bool
) -> Choice:
    """Return a valid choice that keeps the changes ``there``.

    With ``lose``, drop those that depend on missing ones. Otherwise add the changes on which they
    depend. ``variant`` has what becomes of files, by unit.
    """
    choice = Choice()
    wanted: dict[Any, set[int]] = {}
    for number, unit in enumerate(units):
        if unit.is_name:
            wanted.setdefault(unit.node, set()).update([unit.number] if number in there else [])
        else:
            choice.variants[unit.node] = variant.get(number, "whole" if number in there else "lost")
    for folder, kept in wanted.items():
        choice.kept[folder] = frozenset(_closed(folder, kept, lose=lose))
    return choice


def _closed(folder: Folder, kept: set[int], *, lose: bool) -> set[int]:
    closed = set(kept)
    if lose:
        for later in range(len(folder.pending)):
            needs = (earlier for earlier in range(later) if folder.depends(later, earlier))
            if later in closed and not closed.issuperset(needs):
                closed.remove(later)
        return closed
    for later in reversed(range(len(folder.pending))):
        if later in closed:
            closed.update(earlier for earlier in range(later) if folder.depends(later, earlier))
    return closed


def choices(units: list[Unit], rng: random.Random, *, samples: int) -> Iterator[Choice]:
    """Yield choices: all lost, all kept, each one lost, each one kept, every fate of every file, and others.

    The others are ``samples`` random choices. With few units, they are all remaining ones.
    """
    every = frozenset(range(len(units)))
    files = [number for number in every if not units[number].is_name]
    yield make_choice(units, frozenset(), {}, lose=True)
    yield make_choice(units, every, {}, lose=True)
    for number in every:
        yield make_choice(units, every - {number}, {}, lose=True)
        yield make_choice(units, frozenset({number}), {}, lose=False)
    for number, variant in itertools.product(files, VARIANTS):
        yield make_choice(units, every, {number: variant}, lose=True)
        yield make_choice(units, frozenset({number}), {number: variant}, lose=False)
    for variant in VARIANTS:
        yield make_choice(units, every, dict.fromkeys(files, variant), lose=True)
    names = [number for number in every if units[number].is_name]
    if 2 ** len(names) <= samples:
        subsets = [frozenset(c) for size in range(len(names)) for c in itertools.combinations(names, size)]
    else:
        subsets = [frozenset(n for n in names if rng.random() < 0.5) for _ in range(samples)]
    for there in subsets:
        yield make_choice(
            units, there, {number: rng.choice(VARIANTS) for number in files}, lose=rng.random() < 0.5
        )
