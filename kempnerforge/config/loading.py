"""Load a validated job from a file and command-line overrides, with the source of each value."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kempnerforge.config.job import JobConfig, validate_tree
from kempnerforge.config.overrides import COMMAND_LINE, override_layers, unset_none
from kempnerforge.config.sources import DEFAULT, Layer, merge_layers, read_layers, source_of
from kempnerforge.config.suggestions import find_field
from kempnerforge.errors import ConfigError, ConfigIssue


@dataclass(frozen=True)
class LoadedJob:
    """A valid job and its provenance."""

    job: JobConfig
    sources: dict[str, str]
    """Dotted key as in ``job.flat()`` -> path of the file, ``command line`` or ``default``."""


def load_job(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    world_size: int | None = None,
    inside_job: bool = True,
) -> LoadedJob:
    """Read the TOML file at ``path`` (None: defaults only), apply ``overrides`` and validate the result.

    Args:
        path: the file. The file that it ``extends`` is read first.
        overrides: arguments such as ``--train.seed=1``, or ``--train.seed`` and ``1``.
        world_size: number of processes that the layout must fit. None skips that check.
        inside_job: whether ``run.dir`` can be expanded now. False for a check before the job
            starts.

    Raises:
        ConfigError: lists every issue of the file, the overrides and their combination.
    """
    return load_layers(
        [] if path is None else read_layers(Path(path)),
        overrides,
        where=COMMAND_LINE if path is None else str(path),
        world_size=world_size,
        inside_job=inside_job,
    )


def load_layers(
    base: Sequence[Layer],
    overrides: Sequence[str],
    *,
    where: str,
    world_size: int | None,
    inside_job: bool,
) -> LoadedJob:
    """Do what ``load_job`` does, from layers instead of a file. ``where`` is named in errors."""
    line_layers, faults = override_layers(overrides, JobConfig)
    layers = [*base, *line_layers]
    job, tree_faults = validate_tree(
        unset_none(merge_layers(layers), JobConfig),
        world_size=world_size,
        environ=os.environ if inside_job else None,
    )
    faults += [_with_source(fault, layers) for fault in tree_faults]
    if job is None or faults:
        raise ConfigError(faults, where=where)
    return LoadedJob(job, {key: source_of(key, layers) for key in job.flat()})


def _with_source(fault: ConfigIssue, layers: list[Layer]) -> ConfigIssue:
    source = source_of(fault.key, layers)
    field = find_field(fault.key, JobConfig)
    if source == DEFAULT and field is not None and field.is_required():
        source = source_of(fault.key.rpartition(".")[0], layers)
    return replace(fault, source=source)
