"""``kempnerforge eval``: compute the validation loss of a checkpoint, on one process or with torchrun."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
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
        help="A step's folder, or the link RUN/checkpoints/latest, and overrides of its config.",
    ),
]


@app.command(name="eval", context_settings={"ignore_unknown_options": True})
def evaluate(arguments: Arguments, as_json: AsJson = False) -> None:
    """Print the validation loss of a checkpoint, with its stored config and under any layout.

    On several processes: torchrun --nproc-per-node N -m kempnerforge eval STEP_DIR.
    The run is not changed and may be training at the same time.
    """
    rank, world_size = rank_and_world_size(os.environ)
    try:
        positionals, overrides = split_positionals(arguments)
        if not positionals:
            raise typer.BadParameter("STEP_DIR is missing")
        step_folder = find_step(Path(positionals[0]))
        # Additional paths are reported as issues of the overrides, together with all others.
        config, overrides = _stored_config(step_folder), [*overrides, *positionals[1:]]
        loaded, notice = load_for(config, overrides, where=str(step_folder / paths.CONFIG), ranks=world_size)
    except KempnerForgeError as error:
        # All ranks of a node fail alike: the first one reports it.
        if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
            raise
        raise typer.Exit(error.exit_status) from None

    # Imported here: torch takes seconds to import, and help and errors do not need it.
    from kempnerforge.train.evaluation import evaluate_step

    try:
        if notice and rank == 0:
            typer.echo(notice, err=True)
        result = evaluate_step(loaded.job, step_folder)
    except KempnerForgeError as error:
        if rank == 0 or not error.agreed:
            raise
        raise typer.Exit(error.exit_status) from None
    if rank == 0:
        _print(step_folder, loaded.job.eval.num_batches, result, as_json=as_json)


def _print(step_folder: Path, num_batches: int, result: Evaluation, *, as_json: bool) -> None:
    if as_json:
        body = {"path": str(step_folder), "eval/loss": encode_value(result.loss), "num_batches": num_batches}
        body |= {key: value for key, value in asdict(result).items() if key != "loss"}
        typer.echo(json.dumps(body, indent=2))
        return
    for change in result.data_changes:
        typer.echo(f"data: {change}", err=True)
    dims = result.geometry
    typer.echo(
        f"step {result.step}: eval/loss {result.loss!r} over {result.tokens:,} tokens "
        f"({num_batches} batches of {dims.global_batch_size} sequences), "
        f"on {result.num_ranks} x {result.device} (dp_replicate {dims.dp_replicate} x dp_shard "
        f"{dims.dp_shard} x tp {dims.tp} x pp {dims.pp}), {result.wall_s:.1f} s"
    )


def load_for(
    config: Mapping[str, Any], overrides: list[str], *, where: str, ranks: int
) -> tuple[LoadedJob, str]:
    """Return the step's config with ``overrides`` applied, for ``ranks`` processes, and a notice.

    The layout of the step is kept if it fits. Otherwise the model is sharded over all ranks, unless
    ``overrides`` set a layout, and the notice says so. Raises ConfigError.
    """

    def load(table: Mapping[str, Any]) -> LoadedJob:
        # Training may have run without validation.
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
    return loaded, f"the layout of the step, {own}, does not fit and is not used"


def _stored_config(step_folder: Path) -> dict[str, Any]:
    config = StepView.open(step_folder, step=paths.step_number(step_folder.name)).config()
    if "model" not in config:
        raise StepNotFoundError(
            f"{step_folder} has no {paths.CONFIG} with [model]: it was not saved by scripts/train.py, so its "
            "model is unknown"
        )
    return config
