"""Metrics of a step that were measured after its commit: ``metrics.jsonl`` in the checkpoint folder.

A step is committed before it is validated, and its own folder never changes after the commit. A row
also has the run id and the attempt of the step, because after a rollback another step may get the
same number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from kempnerforge import fsio
from kempnerforge.checkpoint.format.manifest import Provenance

NAME = "metrics.jsonl"
Key = tuple[int, str, int]
"""Step, run id and attempt."""


def append(folder: Path, origin: Provenance, metrics: Mapping[str, float]) -> None:
    """Record metrics of the committed step ``origin``. Durable on return. Raises OSError."""
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    row = {"step": origin.step, "run_id": origin.run_id, "attempt": origin.attempt, "metrics": finite}
    fsio.append_line(folder / NAME, json.dumps(row))


def read(folder: Path) -> dict[Key, dict[str, float]]:
    """Return the recorded metrics by step. The last value counts. Lines that are not rows are ignored.

    Raises OSError.
    """
    try:
        lines = fsio.read_file(folder / NAME).split(b"\n")
    except FileNotFoundError:
        return {}
    found: dict[Key, dict[str, float]] = {}
    for line in lines:
        try:
            row = json.loads(line)
            key = (int(row["step"]), str(row["run_id"]), int(row["attempt"]))
            metrics = {str(name): float(value) for name, value in row["metrics"].items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue
        found.setdefault(key, {}).update(metrics)
    return found


def of_step(step_folder: Path, origin: Provenance) -> dict[str, float]:
    """Return all metrics of a step, including those in its manifest. Raises OSError."""
    if origin.step is None:
        return dict(origin.metrics)
    late = read(step_folder.parent).get((origin.step, origin.run_id, origin.attempt), {})
    return {**origin.metrics, **late}
