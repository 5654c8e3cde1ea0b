"""The stored config of a step, for commands that load its model under any layout."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import typer

from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.format.step_info import StepView
from kempnerforge.config.loading import LoadedJob, load_layers
from kempnerforge.config.overrides import COMMAND_LINE
from kempnerforge.config.plugin_uses import plugin_uses
from kempnerforge.config.sources import Layer
from kempnerforge.errors import ConfigError, ConfigIssue, KempnerForgeError, StepNotFoundError


def stored_config(view: StepView) -> dict[str, Any]:
    """Return the config of a step. Raises StepNotFoundError if it does not describe a model."""
    config = view.config()
    if "model" not in config:
        raise StepNotFoundError(
            f"{view.path} has no {paths.CONFIG} with [model]: it was not saved by scripts/train.py, so its "
            "model is unknown"
        )
    return config


def section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a section of a stored config; empty if there is none."""
    found = config.get(name)
    return found if isinstance(found, dict) else {}


def load_for(
    config: Mapping[str, Any], overrides: Sequence[str], *, forced: Layer, where: str, ranks: int
) -> tuple[LoadedJob, str]:
    """Return the step's config, then ``forced`` and ``overrides``, for ``ranks`` processes, and a notice.

    The layout of the step is kept if it fits. Otherwise the model is sharded over all ranks, unless
    ``overrides`` set a layout, and the notice says so. Raises ConfigError.
    """

    def load(table: Mapping[str, Any]) -> LoadedJob:
        layers = [Layer(where, dict(table)), forced]
        return load_layers(layers, overrides, where=where, world_size=ranks, inside_job=False)

    try:
        return load(config), ""
    except ConfigError:
        stored = config.get("distributed")
        if not isinstance(stored, dict):
            raise
    loaded = load({**config, "distributed": {key: stored[key] for key in ("timeout_s",) if key in stored}})
    own = " x ".join(f"{key} {stored.get(key)}" for key in ("dp_replicate", "dp_shard", "tp", "pp"))
    return loaded, f"the layout of the step, {own}, does not fit and is not used"


def refuse_plugins_of_others(loaded: LoadedJob, view: StepView) -> None:
    """Raise ConfigError if a config of another user names plug-ins: their code would run as this user.

    Names that the command line gives are those of this user.
    """
    file = view.path / paths.CONFIG
    if file.stat().st_uid in (os.geteuid(), 0):
        return
    problem = "is named by the config of a step that belongs to another user, and its code would run"
    issues = [
        ConfigIssue(
            use.key,
            f"{use.name} {problem}",
            f"if you trust it, name it yourself: --{use.key}={use.name}",
        )
        for use in plugin_uses(loaded.job)
        # These commands call no hooks and no sinks.
        if use.kind not in ("hook", "sink") and loaded.sources.get(use.key) != COMMAND_LINE
    ]
    if issues:
        raise ConfigError(issues, where=str(file))


def raise_on_first_of_node(error: KempnerForgeError) -> NoReturn:
    """Raise ``error`` on the first rank of a node. The others fail alike, and exit without a message."""
    if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
        raise error
    raise typer.Exit(error.exit_status) from None
