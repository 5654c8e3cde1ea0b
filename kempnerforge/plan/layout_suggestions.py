"""Suggest possible layouts that are closest to an impossible one."""

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
"""Maximum number of suggestions of each kind."""
TRIES = 300
"""Maximum number of candidates to check, closest first."""


@dataclass(frozen=True)
class Nearest:
    """Possible layouts and numbers of processes."""

    overrides: tuple[tuple[str, ...], ...]
    """Sets of arguments. Each set makes the file fit this number of processes."""
    world_sizes: tuple[int, ...]
    """Numbers of processes that the file fits without changes."""


def nearest_layouts(path: str, overrides: Sequence[str], world_size: int) -> Nearest:
    """Return alternatives to a layout that ``load_job`` refuses; none if other settings are invalid too."""
    wanted = _wanted(path, overrides)
    plain = ("tp=1", "pp=1", "dp_shard=-1", "dp_replicate=1", *_WITHOUT_PIPELINE)
    if wanted is None or not _loads(path, [*overrides, *map(_argument, plain)], None):
        return Nearest((), ())
    possible = []
    for candidate in _candidates(wanted, world_size)[:TRIES]:
        arguments = tuple(map(_argument, _changes(wanted, candidate)))
        if arguments and _loads(path, [*overrides, *arguments], world_size):
            possible.append(arguments)
        if len(possible) == MOST:
            break
    sizes = [size for size in _sizes_near(wanted, world_size) if _loads(path, overrides, size)]
    return Nearest(tuple(possible), tuple(sorted(sizes[:MOST])))


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
    """Return all divisions of ``world_size`` into the four dimensions, those closest to ``wanted`` first."""

    def distance(sizes: dict[str, int]) -> tuple[int, float, tuple[int, ...]]:
        changed = [name for name in sizes if sizes[name] != getattr(wanted, name)]
        ratios = [
            abs(math.log2(sizes[name] / getattr(wanted, name)))
            for name in changed
            if getattr(wanted, name) > 0
        ]
        # With dp_shard = -1, a change of dp_shard is not a change of the user's setting.
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
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _changes(wanted: DistributedConfig, sizes: dict[str, int]) -> list[str]:
    """Return the settings that change ``wanted`` to ``sizes``."""
    changed = [
        f"{name}={size}"
        for name, size in sizes.items()
        if size != getattr(wanted, name) and not (name == "dp_shard" and wanted.dp_shard == -1)
    ]
    if sizes["pp"] == 1:
        default = DistributedConfig()
        names = (setting.partition("=")[0] for setting in _WITHOUT_PIPELINE)
        set_here = [getattr(wanted, name) != getattr(default, name) for name in names]
        resets = zip(_WITHOUT_PIPELINE, set_here, strict=True)
        return changed + [setting for setting, is_set in resets if is_set]
    # pp_layers does not apply to another number of stages.
    is_other = sizes["pp"] != wanted.pp and wanted.pp_layers is not None
    return [*changed, "pp_layers=none"] if is_other else changed


def _sizes_near(wanted: DistributedConfig, world_size: int) -> list[int]:
    """Return numbers of processes that fit ``wanted``, closest first."""
    unit = wanted.dp_replicate * wanted.tp * wanted.pp * max(1, wanted.dp_shard)
    if wanted.dp_shard > 0:
        return [unit] if unit != world_size else []
    nearby = world_size // unit
    sizes = [unit * count for count in range(max(1, nearby - MOST), nearby + MOST + 1)]
    return sorted((size for size in sizes if size != world_size), key=lambda size: abs(size - world_size))
