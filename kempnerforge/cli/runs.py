"""``kempnerforge ls``: the runs in a folder, each with its state, progress, last losses and checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from kempnerforge.cli import formatting as text
from kempnerforge.cli.ckpt_paths import AsJson
from kempnerforge.cli.run_state import RunState, is_run, read_state
from kempnerforge.errors import RunFolderError

MAX_DEPTH = 3
"""How many folders below DIR a run may be, such as ``runs/project/sweep/run``."""


def ls(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The folder that has the folders of the runs.")
    ] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List the runs in DIR: state, steps, last losses, age, newest checkpoint, size of checkpoints."""
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise RunFolderError(f"{folder} {problem}; give the folder that has the folders of the runs")
    states = sorted(
        (read_state(run_dir) for run_dir in find_runs(folder)), key=lambda state: -(state.seen or 0.0)
    )
    if as_json:
        text.print_json({"dir": str(folder), "runs": [state.to_json() for state in states]})
        return
    if not states:
        typer.echo(f"{folder} has no runs")
        return
    rows = [("run", "state", "step", "loss", "eval", "last seen", "committed", "size")]
    rows += [_row(state, folder) for state in states]
    text.print_columns(rows, right=(2, 3, 4, 6, 7))


def find_runs(folder: Path, depth: int = MAX_DEPTH) -> list[Path]:
    """Return ``folder`` if it is a run's, else the runs below it. Ignore links and hidden folders."""
    if is_run(folder):
        return [folder]
    try:
        with os.scandir(folder) as entries:
            below = [
                Path(entry.path)
                for entry in entries
                if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)
            ]
    except PermissionError:  # another user's folder
        return []
    return [run for path in sorted(below) for run in (find_runs(path, depth - 1) if depth else [])]


def _row(state: RunState, folder: Path) -> tuple[str, ...]:
    name = os.path.relpath(state.run_dir, folder) if state.run_dir != folder else state.run_dir.name or "."
    steps = f"{state.step:,}/{state.max_steps:,}" if state.max_steps else f"{state.step:,}"
    return (
        name,
        state.state,
        steps,
        _loss(state.loss),
        _loss(state.eval_loss),
        f"{text.age(state.seen)} ago" if state.seen else "",
        f"{state.committed:,}" if state.committed is not None else "none",
        text.size(state.size_bytes),
    )


def _loss(loss: Any) -> str:
    return f"{loss:.4f}" if isinstance(loss, int | float) else ""
