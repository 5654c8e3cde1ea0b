"""``kempnerforge ckpt inspect`` and ``du``: the contents of a step, and disk usage."""

from __future__ import annotations

import fnmatch
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.format.step_info import KINDS, StepView, tensor_bytes
from kempnerforge.checkpoint.format.tensor_index import TensorEntry
from kempnerforge.checkpoint.tools.diff import describe
from kempnerforge.cli import formatting as text
from kempnerforge.cli.ckpt_list import bytes_on_disk, files_of, list_others
from kempnerforge.cli.ckpt_paths import AsJson, RunPath, StepPath, find_run, find_step
from kempnerforge.errors import CheckpointError

KIND_COLUMNS: tuple[str, ...] = (*KINDS, "other")


def inspect(
    step_dir: StepPath,
    match: Annotated[
        str, typer.Option(metavar="GLOB", help='Show only tensors whose name matches, e.g. "model.*".')
    ] = "*",
    as_json: AsJson = False,
) -> None:
    """Show the contents of a step: origin, files, tensors, layout, versions, train state."""
    view = StepView.open(find_step(step_dir))
    tensors = {name: entry for name, entry in view.tensors().items() if fnmatch.fnmatchcase(name, match)}
    if as_json:
        text.print_json(_as_json(view, tensors))
        return
    _print_origin(view)
    typer.echo("files:")
    rows = [(f"  {name}", text.size(record.size_bytes)) for name, record in view.manifest.files.items()]
    text.print_columns(rows, right=(1,))
    typer.echo("train state:")
    for key, content in text.flatten(view.train_state()):
        typer.echo(f"  {key} = {text.value(content)}")
    typer.echo(f"tensors: {len(tensors)}" + ("" if match == "*" else f" that match {match}"))
    if tensors:
        rows = [
            (f"  {name}", describe(entry), text.size(tensor_bytes(entry)), _chunks(entry))
            for name, entry in tensors.items()
        ]
        text.print_columns(rows, right=(2,))


def du(run: RunPath, as_json: AsJson = False) -> None:
    """Show the disk usage of every step of RUN (model, optimizer, rng, other) and of other folders."""
    checkpoints = find_run(run)
    steps: list[dict[str, Any]] = []
    files: list[os.stat_result] = []
    listing = paths.list_folder(checkpoints.folder)
    for step in listing.steps:
        path = checkpoints.step(step)
        try:
            kinds: dict[str, int | None] = dict(StepView.open(path, step=step).bytes_by_kind())
            problem = ""
        except (CheckpointError, OSError) as error:
            kinds, problem = dict.fromkeys(KIND_COLUMNS), str(error)
        found = files_of(path)
        files += found
        total = sum(file.st_size for file in found)
        if path.is_dir():
            steps.append({"step": step, "bytes": kinds, "total_bytes": total, "problem": problem or None})
    others = list_others(listing)
    files += [file for other in others for file in files_of(Path(other["path"]))]
    everything = bytes_on_disk(files)
    if as_json:
        body = {
            "folder": str(checkpoints.folder),
            "steps": steps,
            "others": others,
            "total_bytes": everything,
        }
        text.print_json(body)
        return
    rows: list[tuple[str, ...]] = [("step", *KIND_COLUMNS, "total")]
    for usage in steps:
        cells = [text.size(size) if size is not None else "?" for size in usage["bytes"].values()]
        rows.append((str(usage["step"]), *cells, text.size(usage["total_bytes"])))
    text.print_columns(rows, right=range(len(rows[0])))
    for other in others:
        typer.echo(f"{other['what']}: {Path(other['path']).name}, {text.size(other['size_bytes'])}")
    shared = sum(file.st_size for file in files) - everything
    note = f", without {text.size(shared)} of links to the same files" if shared else ""
    typer.echo(f"total: {text.size(everything)} in {checkpoints.folder}{note}")


def _print_origin(view: StepView) -> None:
    origin = view.manifest.provenance
    saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(view.manifest.time))
    parent = "" if origin.parent_step is None else f", after step {origin.parent_step}"
    lines = {
        "step": "not part of a run" if origin.step is None else f"{origin.step}, saved for: {origin.reason}",
        "run": f"{origin.run_id or 'unknown'}, attempt {origin.attempt}{parent}",
        "time": f"{saved}, {text.age(view.manifest.time)} ago",
        "size": text.size(view.size_bytes),
        "layout": _pairs(origin.layout),
        "versions": _pairs(origin.versions),
        "metrics": _pairs(origin.metrics),
    }
    typer.echo(str(view.path))
    for name, content in lines.items():
        if content:
            typer.echo(f"{name}: {content}")


def _pairs(table: dict[str, Any]) -> str:
    return ", ".join(f"{name} {content}" for name, content in table.items())


def _chunks(entry: TensorEntry) -> str:
    files = dict.fromkeys(chunk.file for chunk in entry.chunks)
    return next(iter(files)) if len(files) == 1 else f"{len(entry.chunks)} chunks in {len(files)} files"


def _as_json(view: StepView, tensors: dict[str, TensorEntry]) -> dict[str, Any]:
    return {
        "path": str(view.path),
        **asdict(view.manifest.provenance),
        "time": view.manifest.time,
        "size_bytes": view.size_bytes,
        "files": {name: record.size_bytes for name, record in view.manifest.files.items()},
        "tensors": {
            name: {**asdict(entry), "size_bytes": tensor_bytes(entry)} for name, entry in tensors.items()
        },
        "train_state": view.train_state(),
        "config": view.config(),
    }
