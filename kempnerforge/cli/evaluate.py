"""``kempnerforge eval``: the validation loss of a checkpoint, on one process or under torchrun."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.format.step_info import StepView
from kempnerforge.cli.ckpt_paths import AsJson, find_step
from kempnerforge.cli.train import rank_and_world_size
from kempnerforge.config.loading import LoadedJob, load_layers
from kempnerforge.config.overrides import split_positionals
from kempnerforge.config.sources import Layer
from kempnerforge.errors import ConfigError, KempnerForgeError, StepNotFoundError
from kempnerforge.telemetry.jsonl import encode_value

app = typer.Typer(add_completion=False)

if TYPE_CHECKING:
    from kempnerforge.train.evaluation import Evaluation

Arguments = Annotated[
    list[str],
    typer.Argument(
        metavar="STEP_DIR [--section.key=value ...]",
        help="A step's folder, or the link RUN/checkpoints/latest; and values to put over its config.",
    ),
]


@app.command(name="eval", context_settings={"ignore_unknown_options": True})
def evaluate(arguments: Arguments, as_json: AsJson = False) -> None:
    """Print the validation loss of a checkpoint, under the config that is stored with it and any layout.

    On several processes: torchrun --nproc-per-node N -m kempnerforge eval STEP_DIR. Nothing of the run is
    changed, and it may be training meanwhile.
    """
    rank, world_size = rank_and_world_size(os.environ)
    try:
        positionals, overrides = split_positionals(arguments)
        if not positionals:
            raise typer.BadParameter("STEP_DIR is missing")
        step_folder = find_step(Path(positionals[0]))
        # More than one is a fault among the overrides, reported with all others.
        config, overrides = _stored_config(step_folder), [*overrides, *positionals[1:]]
        loaded, told = load_for(config, overrides, where=str(step_folder / paths.CONFIG), ranks=world_size)
    except KempnerForgeError as error:
        # All ranks of a node see the same: its first one speaks.
        if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
            raise
        raise typer.Exit(error.exit_status) from None

    # Here, not above: help and refusals need no torch, which takes seconds to import.
    from kempnerforge.train.evaluation import evaluate_step

    def note(text: str) -> None:
        typer.echo(text, err=True)

    try:
        if told and rank == 0:
            note(told)
        result = evaluate_step(loaded.job, step_folder, note=note)
    except KempnerForgeError as error:
        if rank == 0 or not error.agreed:
            raise
        raise typer.Exit(error.exit_status) from None
    if rank == 0:
        _print(step_folder, loaded.job.eval.num_batches, result, note=note, as_json=as_json)


def _print(
    step_folder: Path, num_batches: int, result: Evaluation, *, note: Callable[[str], None], as_json: bool
) -> None:
    if as_json:
        body = {"path": str(step_folder), "eval/loss": encode_value(result.loss), "num_batches": num_batches}
        body |= {key: value for key, value in asdict(result).items() if key != "loss"}
        typer.echo(json.dumps(body, indent=2))
        return
    for change in result.data_changes:
        note(f"data: {change}")
    place = result.geometry
    typer.echo(
        f"step {result.step}: eval/loss {result.loss!r} over {result.tokens:,} tokens "
        f"({num_batches} batches of {place.global_batch_size} sequences), "
        f"on {result.num_ranks} x {result.device} (dp_replicate {place.dp_replicate} x dp_shard "
        f"{place.dp_shard} x tp {place.tp} x pp {place.pp}), {result.wall_s:.1f} s"
    )


def load_for(
    config: Mapping[str, Any], overrides: list[str], *, where: str, ranks: int
) -> tuple[LoadedJob, str]:
    """The step's config with ``overrides`` over it, for ``ranks`` processes, and what there is to say of it.

    The layout that the step was saved under is kept where it fits; else the model is sharded over all ranks,
    unless ``overrides`` say otherwise. Raises ConfigError.
    """

    def load(table: Mapping[str, Any]) -> LoadedJob:
        # Training may have gone without validation.
        layers = [Layer(where, dict(table)), Layer("kempnerforge eval", {"eval": {"interval": 1}})]
        return load_layers(layers, overrides, where=where, world_size=ranks, inside_job=False)

    try:
        return load(config), ""
    except ConfigError:
        stored = config.get("distributed")
        if not isinstance(stored, dict):
            raise
    loaded = load({**config, "distributed": {key: stored[key] for key in ("timeout_s",) if key in stored}})
    own = " x ".join(f"{key} {stored.get(key)}" for key in ("dp_replicate", "dp_shard", "tp", "pp"))
    return loaded, f"the step's own layout, {own}, does not fit and is left aside"


def _stored_config(step_folder: Path) -> dict[str, Any]:
    config = StepView.open(step_folder, step=paths.step_number(step_folder.name)).config()
    if "model" not in config:
        raise StepNotFoundError(
            f"{step_folder} has no [model] in a {paths.CONFIG}: it was not saved by scripts/train.py, so it "
            "is not known which model it is of"
        )
    return config
