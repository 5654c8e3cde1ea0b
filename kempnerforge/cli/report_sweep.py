"""``kempnerforge report`` of a sweep: one line per run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from kempnerforge.checkpoint.run import lease, lineage, metadata
from kempnerforge.cli import formatting as text
from kempnerforge.errors import EXIT_FINISHED, EXIT_STOPPED, RunFolderError
from kempnerforge.goodput.run_history import METRICS
from kempnerforge.slurm.sweep import Cell, read_sweep
from kempnerforge.telemetry.curves import Curve, read_curves

KEYS = ("train/loss", "eval/loss")
HEADS = ("task", "values", "state", "step", "train/loss", "best eval/loss")


def print_sweep(folder: Path, *, as_json: bool) -> None:
    """Print how far each run of the sweep in ``folder`` is, and its losses."""
    rows = [_row(folder / Path(cell.run_dir).name, cell) for cell in read_sweep(folder).cells]
    if as_json:
        text.print_json({"sweep": str(folder), "runs": rows})
        return
    lines = [
        (
            str(row["task"]),
            ", ".join(row["values"]),
            row["state"],
            _shown(row["step"], "d"),
            _shown(row["train/loss"], ".4f"),
            _shown(row["best_eval/loss"], ".4f"),
        )
        for row in rows
    ]
    text.print_columns([HEADS, *lines], right=(0, 3, 4, 5))


def _row(run_dir: Path, cell: Cell) -> dict[str, Any]:
    """Return the values of a run. Those that it does not have yet are None."""
    values = [override.removeprefix("--") for override in cell.overrides]
    row: dict[str, Any] = {"task": cell.task, "values": values, "run_dir": str(run_dir)}
    try:
        record = metadata.read(run_dir)
        if record is None:
            return {**row, "state": "not started", "step": None, "train/loss": None, "best_eval/loss": None}
        resumes = {cut.attempt: cut.step for cut in lineage.cuts(run_dir)}
        curves = read_curves(run_dir / METRICS, KEYS, resumes)
        state = "running" if lease.live_holder(run_dir) else _end(record.last_exit)
    except OSError as error:
        raise RunFolderError(f"{run_dir} cannot be read: {error}") from error
    losses, evaluations = (curves.counting[key] for key in KEYS)
    return {
        **row,
        "state": state,
        "step": int(losses.steps[-1]) if losses.steps else None,
        "train/loss": losses.values[-1] if losses.values else None,
        "best_eval/loss": _best(evaluations),
    }


def _end(last_exit: dict[str, Any] | None) -> str:
    status = last_exit["status"] if last_exit is not None else None
    if status == EXIT_FINISHED:
        return "finished"
    if status is None:
        return "ended without a record"
    return "stopped" if status == EXIT_STOPPED else f"failed ({status})"


def _best(curve: Curve) -> float | None:
    return min((value for value in curve.values if not math.isnan(value)), default=None)


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
