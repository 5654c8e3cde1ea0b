"""``kempnerforge eval``: compute the validation loss of a checkpoint, on one process or with torchrun."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.format.step_info import StepView
from kempnerforge.cli.ckpt_paths import AsJson, find_step
from kempnerforge.cli.step_config import (
    load_for,
    raise_on_first_of_node,
    refuse_plugins_of_others,
    stored_config,
)
from kempnerforge.cli.train import rank_and_world_size
from kempnerforge.config.overrides import split_positionals
from kempnerforge.config.sources import Layer
from kempnerforge.errors import KempnerForgeError
from kempnerforge.telemetry.jsonl import encode_value

app = typer.Typer(add_completion=False)

if TYPE_CHECKING:
    from kempnerforge.train.evaluation import Evaluation

FORCED = Layer("kempnerforge eval", {"eval": {"interval": 1}})
"""Training may have run without validation."""

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
        overrides += positionals[1:]
        view = StepView.open(step_folder, step=paths.step_number(step_folder.name))
        loaded, notice = load_for(
            stored_config(view),
            overrides,
            forced=FORCED,
            where=str(step_folder / paths.CONFIG),
            ranks=world_size,
        )
        refuse_plugins_of_others(loaded, view)
    except KempnerForgeError as error:
        raise_on_first_of_node(error)

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
        of_sources = {name: encode_value(loss) for name, loss in result.source_losses.items()}
        body |= asdict(result) | {"source_losses": of_sources}
        del body["loss"]
        typer.echo(json.dumps(body, indent=2))
        return
    for change in result.data_changes:
        typer.echo(f"data: {change}", err=True)
    dims = result.geometry
    typer.echo(
        f"step {result.step}: eval/loss {result.loss!r} over {result.tokens:,} {result.unit} "
        f"({num_batches} batches of {dims.global_batch_size} sequences), "
        f"on {result.num_ranks} x {result.device} (dp_replicate {dims.dp_replicate} x dp_shard "
        f"{dims.dp_shard} x tp {dims.tp} x pp {dims.pp}), {result.wall_s:.1f} s"
    )
    for name, loss in result.source_losses.items():
        typer.echo(f"eval/loss/{name} {loss!r}")
