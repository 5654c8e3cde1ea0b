"""``load_path``: begin a new run from another run's checkpoint."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path

from kempnerforge.checkpoint.format import latest_link, paths
from kempnerforge.checkpoint.load import candidates, load_path
from kempnerforge.checkpoint.load.candidates import Candidate
from kempnerforge.errors import DamagedCheckpointError, NoTrainingStateError, StepNotFoundError


def find(path: Path) -> Candidate:
    """The checkpoint at ``path``: a step's folder, a folder of steps, or a run's folder (newest step).

    Rank 0 only. Nothing of another run is ever renamed: damage is an error here. Raises StepNotFoundError,
    DamagedCheckpointError, UnreachableCheckpointError.
    """
    path = candidates.with_retries(lambda: latest_link.resolve(path), what=str(path.parent))
    try:
        steps = load_path.candidates(path)
    except StepNotFoundError as error:
        raise StepNotFoundError(f"checkpoint.load_path: {error}") from None
    for found in steps:
        step = None if found == path else paths.step_number(found.name)
        with contextlib.suppress(NoTrainingStateError):  # named by its own path, it can be loaded
            return candidates.with_retries(
                functools.partial(candidates.inspect, found, step=step), what=str(found)
            )
    raise StepNotFoundError(
        f"checkpoint.load_path: {path} has steps of weights alone; name one of them, such as {steps[0]}"
    )


def damaged(found: Candidate, reason: str) -> DamagedCheckpointError:
    """The error for a warm start whose source turned out damaged on some rank."""
    return DamagedCheckpointError(
        f"checkpoint.load_path: {reason}. It was left as it is; choose another step of that run."
    )
