"""``kempnerforge ckpt verify`` and ``diff``: verify every byte of a step, and compare two steps."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from kempnerforge.checkpoint.format.step_info import StepView
from kempnerforge.checkpoint.retention import read_locks
from kempnerforge.checkpoint.tools.diff import TensorDifferences, changes, compare_tensors
from kempnerforge.checkpoint.tools.verify import Verified
from kempnerforge.checkpoint.tools.verify import verify as verify_step
from kempnerforge.cli import formatting as text
from kempnerforge.cli.ckpt_paths import AsJson, find_step, find_steps
from kempnerforge.errors import EXIT_FAULT, CheckpointError, StepNotFoundError

MAX_SHOWN = 20
"""Maximum number of lines of one kind on the terminal; --json has all."""


def verify(
    path: Annotated[Path, typer.Argument(metavar="STEP_DIR|RUN", help="A step's folder, or a run's.")],
    threads: Annotated[int | None, typer.Option(min=1, help="Threads that read and hash.")] = None,
    as_json: AsJson = False,
) -> None:
    """Verify every byte of a step, or of all steps of a run. Exit status 0: all ok, 1: one is corrupt."""
    steps, run = find_steps(path)
    results: list[Verified] = []
    failed: list[tuple[Path, CheckpointError]] = []
    for step in steps:
        try:
            with text.progress(step.name) as progress:
                results.append(verify_step(step, threads=threads, progress=progress))
        except StepNotFoundError:
            if run is None:
                raise  # a step of a whole run is skipped instead: retention may have deleted it
            continue
        except CheckpointError as error:
            failed.append((step, error))
        if not as_json:
            _print_verified(results[-1]) if not failed or failed[-1][0] != step else typer.echo(failed[-1][1])
    if as_json:
        body = [{**asdict(result), "path": str(result.path), "sound": result.sound} for result in results]
        errors = [{"path": str(step), "error": str(error)} for step, error in failed]
        all_sound = not errors and all(result.sound for result in results)
        text.print_json({"sound": all_sound, "steps": body, "errors": errors})
    if any(not result.sound for result in results):
        raise typer.Exit(EXIT_FAULT)
    if failed:
        raise typer.Exit(failed[0][1].exit_status)


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A step's folder.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another step's folder, of any run and layout.")],
    content: Annotated[
        bool, typer.Option(help="Also compare the contents of tensors. This reads both steps completely.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Compare two steps: config, layout, versions, train state, tensors."""
    path_a, path_b = find_step(a), find_step(b)
    with read_locks.lock_for_reading(path_a, what="diff"), read_locks.lock_for_reading(path_b, what="diff"):
        view_a, view_b = StepView.open(path_a), StepView.open(path_b)
        tables = _tables(view_a, view_b)
        with text.progress("comparing tensors") as progress:
            tensors = compare_tensors(view_a, view_b, content=content, progress=progress)
    if as_json:
        body = {
            "a": str(path_a),
            "b": str(path_b),
            "same": not tensors.any and not any(tables.values()),
            **tables,
            "tensors": asdict(tensors),
        }
        text.print_json(body)
        return
    for name, changed in tables.items():
        _print_list(
            f"{name.replace('_', ' ')}: {len(changed) or 'no'} differences",
            [f"{key}: {text.value(before)} -> {text.value(now)}" for key, (before, now) in changed.items()],
        )
    _print_tensors(tensors)


def _tables(a: StepView, b: StepView) -> dict[str, dict[str, list[Any]]]:
    origin_a, origin_b = a.manifest.provenance, b.manifest.provenance
    return {
        "config": changes(a.config(), b.config()),
        "layout": changes(origin_a.layout, origin_b.layout),
        "versions": changes(origin_a.versions, origin_b.versions),
        "train_state": changes(a.train_state(), b.train_state()),
    }


def _print_verified(result: Verified) -> None:
    state = f"ok, {text.size(result.size_bytes)}" if result.sound else "corrupt"
    _print_list(f"{result.path}: {state}", list(result.problems))
    if result.foreign:
        typer.echo(f"  not part of it: {', '.join(result.foreign)}")


def _print_tensors(differences: TensorDifferences) -> None:
    _print_list(f"tensors only in A: {len(differences.only_a)}", list(differences.only_a))
    _print_list(f"tensors only in B: {len(differences.only_b)}", list(differences.only_b))
    shapes = [f"{name}: {before} -> {now}" for name, (before, now) in differences.shape_or_dtype.items()]
    _print_list(f"tensors that differ in shape or dtype: {len(shapes)}", shapes)
    if differences.content is None:
        typer.echo(f"tensors of the same shape and dtype: {differences.equal}; contents not compared")
    else:
        _print_list(f"tensors that differ in content: {len(differences.content)}", list(differences.content))
        typer.echo(f"equal tensors: {differences.equal}")


def _print_list(title: str, lines: list[str]) -> None:
    typer.echo(title)
    for line in lines[:MAX_SHOWN]:
        typer.echo(f"  {line}")
    if len(lines) > MAX_SHOWN:
        typer.echo(f"  and {len(lines) - MAX_SHOWN} more; --json shows all")
