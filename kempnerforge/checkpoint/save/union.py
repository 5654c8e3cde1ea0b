"""Decide which rank saves which tensors and other leaves, from what each rank holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kempnerforge.checkpoint.format import structure
from kempnerforge.checkpoint.save.commit import PlannedItem


@dataclass(frozen=True)
class Held:
    """What one rank could save."""

    items: list[PlannedItem]
    """Its parts of tensors, sorted by name."""
    objects: tuple[str, ...] = ()
    """Names of its non-tensor leaves."""
    inside: Mapping[str, str] | None = None
    """Tensors inside a non-tensor leaf, such as a tuple: name -> name of the leaf."""
    structure: Mapping[str, Any] | None = None
    """The paths of its leaves in a nested state dict, as JSON."""
    from_lowest_rank: tuple[str, ...] = ()
    """Names of tensors to save from the lowest rank that has them."""
    frozen: tuple[str, ...] = ()
    """Names of tensors that do not change."""


@dataclass(frozen=True)
class Union:
    """What each rank saves."""

    items: list[list[PlannedItem]]
    """By rank."""
    contributed: list[frozenset[str]]
    """By rank: names of non-tensor leaves to send to the first rank, because no lower rank has them."""
    structure: dict[str, Any] | None
    frozen: frozenset[str] = frozenset()
    """Names of tensors that are frozen on every rank that has a part of them."""


def unite(held_by_rank: Sequence[Held]) -> Union:
    """Decide which rank saves each leaf: the lowest rank that has it.

    Raises ValueError if a leaf is a tensor on one rank and something else on another.
    """
    owner: dict[str, int] = {}
    for rank, held in enumerate(held_by_rank):
        for name in held.objects:
            owner.setdefault(name, rank)
    names = [{planned.item.name for planned in held.items} for held in held_by_rank]
    saved: set[str] = set()
    items = []
    for rank, held in enumerate(held_by_rank):
        kept = _kept(rank, held, owner, names)
        items.append([planned for planned in kept if planned.item.name not in saved])
        saved |= names[rank] & set(held.from_lowest_rank)
    for rank, held in enumerate(held_by_rank):
        for planned in held.items:
            name = planned.item.name
            if name in owner and name not in (held.inside or ()):
                raise ValueError(f"{name} is a tensor on rank {rank} and none on rank {owner[name]}")
    contributed = [
        frozenset(name for name in held.objects if rank and owner[name] == rank)
        for rank, held in enumerate(held_by_rank)
    ]
    changing = [of_rank.difference(held.frozen) for of_rank, held in zip(names, held_by_rank, strict=True)]
    frozen = frozenset(name for held in held_by_rank for name in held.frozen).difference(*changing)
    return Union(items, contributed, _structure(held_by_rank), frozen)


def _kept(rank: int, held: Held, owner: Mapping[str, int], names: Sequence[set[str]]) -> list[PlannedItem]:
    """Leave out each whole tensor inside a leaf that another rank saves, if that rank has the tensor too."""
    inside = held.inside or {}

    def is_saved(planned: PlannedItem) -> bool:
        name = planned.item.name
        if name not in inside or planned.item.sizes != planned.global_shape:
            return True
        saved_by = owner[inside[name]]
        return saved_by == rank or name not in names[saved_by]

    return [planned for planned in held.items if is_saved(planned)]


def _structure(held_by_rank: Sequence[Held]) -> dict[str, Any] | None:
    bodies = [held.structure for held in held_by_rank]
    if not any(bodies):
        return None
    if all(body == bodies[0] for body in bodies):
        return dict(bodies[0] or {})
    return structure.merge((held.structure, _leaves(held)) for held in held_by_rank)


def _leaves(held: Held) -> list[str]:
    inside = held.inside or {}
    return [*held.objects, *(item.item.name for item in held.items if item.item.name not in inside)]
