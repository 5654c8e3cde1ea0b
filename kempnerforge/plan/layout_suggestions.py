"""The possible layouts nearest to one that is not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from kempnerforge.config.distributed import DistributedConfig
from kempnerforge.config.job import JobConfig
from kempnerforge.config.loading import load_job
from kempnerforge.config.overrides import override_layers, unset_none
from kempnerforge.config.sources import merge_layers, read_layers
from kempnerforge.errors import ConfigError

MOST = 4
"""Suggestions of each kind."""
TRIES = 300
"""Candidates that are checked, nearest first."""


@dataclass(frozen=True)
class Nearest:
    """What would be possible."""

    overrides: tuple[tuple[str, ...], ...]
    """Sets of arguments, each of which makes the file fit this number of processes."""
    world_sizes: tuple[int, ...]
    """Numbers of processes that the file fits as it is."""


def nearest_layouts(path: str, overrides: Sequence[str], world_size: int) -> Nearest:
    """What is near a layout that ``load_job`` refuses; empty when more than the layout is wrong."""
    wanted = _wanted(path, overrides)
    plain = ("tp=1", "pp=1", "dp_shard=-1", "dp_replicate=1", *_WITHOUT_PIPELINE)
    if wanted is None or not _loads(path, [*overrides, *map(_argument, plain)], None):
        return Nearest((), ())
    found = []
    for candidate in _candidates(wanted, world_size)[:TRIES]:
        arguments = tuple(map(_argument, _changes(wanted, candidate)))
        if arguments and _loads(path, [*overrides, *arguments], world_size):
            found.append(arguments)
        if len(found) == MOST:
            break
    sizes = [size for size in _sizes_near(wanted, world_size) if _loads(path, overrides, size)]
    return Nearest(tuple(found), tuple(sorted(sizes[:MOST])))


_WITHOUT_PIPELINE = ("pp_schedule=1f1b", "pp_microbatch_size=none", "pp_layers=none")


def _argument(setting: str) -> str:
    return f"--distributed.{setting}"


def _wanted(path: str, overrides: Sequence[str]) -> DistributedConfig | None:
    try:
        layers = [*read_layers(Path(path)), *override_layers(overrides, JobConfig)[0]]
        table = unset_none(merge_layers(layers), JobConfig).get("distributed", {})
        return DistributedConfig.model_validate(table)
    except (ConfigError, ValidationError):
        return None


def _loads(path: str, overrides: Sequence[str], world_size: int | None) -> bool:
    try:
        load_job(path, overrides, world_size=world_size, inside_job=False)
    except ConfigError:
        return False
    return True


def _candidates(wanted: DistributedConfig, world_size: int) -> list[dict[str, int]]:
    """Every division of ``world_size`` into the four dimensions, those nearest to ``wanted`` first."""

    def distance(sizes: dict[str, int]) -> tuple[int, float, tuple[int, ...]]:
        changed = [name for name in sizes if sizes[name] != getattr(wanted, name)]
        ratios = [
            abs(math.log2(sizes[name] / getattr(wanted, name)))
            for name in changed
            if getattr(wanted, name) > 0
        ]
        # Whoever leaves dp_shard open loses nothing when it changes.
        real = [name for name in changed if name != "dp_shard" or wanted.dp_shard > 0]
        return len(real), sum(ratios), tuple(sizes.values())

    return sorted(_divisions(world_size), key=distance)


def _divisions(world_size: int) -> Iterator[dict[str, int]]:
    for tp in _divisors(world_size):
        for pp in _divisors(world_size // tp):
            for replicate in _divisors(world_size // tp // pp):
                shard = world_size // tp // pp // replicate
                yield {"tp": tp, "pp": pp, "dp_replicate": replicate, "dp_shard": shard}


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]


def _changes(wanted: DistributedConfig, sizes: dict[str, int]) -> list[str]:
    """The settings that turn ``wanted`` into ``sizes``."""
    changed = [
        f"{name}={size}"
        for name, size in sizes.items()
        if size != getattr(wanted, name) and not (name == "dp_shard" and wanted.dp_shard == -1)
    ]
    if sizes["pp"] == 1:
        default = DistributedConfig()
        names = (setting.partition("=")[0] for setting in _WITHOUT_PIPELINE)
        set_here = [getattr(wanted, name) != getattr(default, name) for name in names]
        return changed + [one for one, is_set in zip(_WITHOUT_PIPELINE, set_here, strict=True) if is_set]
    # How many layers each stage has says nothing about another number of stages.
    is_other = sizes["pp"] != wanted.pp and wanted.pp_layers is not None
    return [*changed, "pp_layers=none"] if is_other else changed


def _sizes_near(wanted: DistributedConfig, world_size: int) -> list[int]:
    """Numbers of processes that divide into ``wanted``, nearest first."""
    unit = wanted.dp_replicate * wanted.tp * wanted.pp * max(1, wanted.dp_shard)
    if wanted.dp_shard > 0:
        return [unit] if unit != world_size else []
    nearby = world_size // unit
    sizes = [unit * count for count in range(max(1, nearby - MOST), nearby + MOST + 1)]
    return sorted((size for size in sizes if size != world_size), key=lambda size: abs(size - world_size))
