"""``load_path``: begin a new run from another run's checkpoint."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path

from kempnerforge.checkpoint import layout, resume
from kempnerforge.checkpoint.resume import Found
from kempnerforge.errors import DamagedCheckpointError, NoTrainingStateError, StepNotFoundError


def find(path: Path) -> Found:
    """The checkpoint at ``path``: a step's folder, a folder of steps, or a run's folder (newest step).

    Rank 0 only. Nothing of another run is ever renamed: damage is an error here. Raises StepNotFoundError,
    DamagedCheckpointError, UnreachableCheckpointError.
    """
    if (path / layout.MANIFEST).is_file():
        return resume.with_retries(lambda: resume.inspect(path), what=str(path))
    for folder in (path, path / "checkpoints"):
        for step in layout.committed_steps(folder):
            newest = folder / layout.step_name(step)
            with contextlib.suppress(NoTrainingStateError):  # named by its own path, it can be loaded
                return resume.with_retries(
                    functools.partial(resume.inspect, newest, step=step), what=str(newest)
                )
    what = "holds no committed checkpoint" if path.exists() else "does not exist"
    raise StepNotFoundError(
        f"checkpoint.load_path: {path} {what}; give a step's folder, such as RUN/checkpoints/step_00001000, "
        "or a run's folder"
    )


def damaged(found: Found, reason: str) -> DamagedCheckpointError:
    """The error for a warm start whose source turned out damaged on some rank."""
    return DamagedCheckpointError(
        f"checkpoint.load_path: {reason}. It was left as it is; choose another step of that run."
    )
