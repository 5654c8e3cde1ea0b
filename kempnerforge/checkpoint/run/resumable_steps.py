"""Check whether a run can resume from a step: it must hold a complete training state, not only weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kempnerforge.checkpoint.format import manifest, paths
from kempnerforge.checkpoint.format.json_values import decode_objects
from kempnerforge.checkpoint.format.manifest import Manifest
from kempnerforge.checkpoint.run.owner import ANYONE, Owner
from kempnerforge.errors import DamagedCheckpointError, NoTrainingStateError

COUNTERS = ("step", "tokens", "skipped_steps", "skipped_in_a_row")


def check_counters(objects: Mapping[str, Any], *, step: int | None) -> None:
    """Raise ValueError unless the counters of a ``TrainState`` are integers and match the manifest's step.

    A checkpoint that is not of a ``TrainState`` has no counters, and passes.
    """
    if step is not None and objects.get("step", step) != step:
        raise ValueError(f"it holds step {objects['step']}, but the manifest says step {step}")
    if "step" in objects and not all(type(objects.get(name)) is int for name in COUNTERS):
        raise ValueError(f"{', '.join(COUNTERS)} are not all integers")


def require_training_state(step_folder: Path, objects: Mapping[str, Any]) -> None:
    """Raise NoTrainingStateError unless a run can resume from a step with these ``objects``."""
    if "step" not in objects:
        raise NoTrainingStateError(
            f"{step_folder.name} holds no training state (only weights?): {paths.TRAIN_STATE} has no step"
        )


def load_resumable(step_folder: Path, *, step: int, owner: Owner = ANYONE) -> Manifest:
    """Call ``manifest.load``, and check that a run can resume from the step.

    Retention must not count another kind of step as the newest, because it would then delete steps
    that the run needs. For a step that ``owner`` does not own, only the manifest is read. Raises
    what ``manifest.load`` raises, and NoTrainingStateError.
    """
    found = manifest.load(step_folder, step=step)
    if not owner.owns(found.provenance):
        return found
    try:
        objects = decode_objects(manifest.read_verified(step_folder, found, paths.TRAIN_STATE))
    except (ValueError, TypeError, RecursionError) as error:
        raise DamagedCheckpointError(
            f"{step_folder.name} is damaged: {paths.TRAIN_STATE} cannot be decoded ({error})"
        ) from None
    require_training_state(step_folder, objects)
    return found
