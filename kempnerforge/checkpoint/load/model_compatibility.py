"""Whether the config of a run is of the model that a step was saved with. Before any tensor is read."""

from __future__ import annotations

import tomli

from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.load.candidates import Candidate
from kempnerforge.config.model_changes import ModelChanges, model_changes
from kempnerforge.distributed.consensus import mark_collective
from kempnerforge.errors import MismatchError


def refuse_other_model(found: Candidate, config_toml: str) -> None:
    """Refuse to go on with another model, even if all shapes are the same.

    Not collective: all ranks see the same two configs, and so raise together. Raises MismatchError.
    """
    changes = _compare(found, config_toml)
    if not changes.lines:
        return
    way_on = "To go on with this run, set it back. To train the other model, give the run another name"
    if changes.same_shapes:
        way_on += f"; it may begin from these weights: --run.name=NEW --checkpoint.load_path={found.path}"
    else:
        way_on += " (--run.name=NEW)"
    raise mark_collective(MismatchError(f"{_described(found, changes)}\n{way_on}"))


def refuse_other_shapes(found: Candidate, config_toml: str) -> None:
    """Refuse a warm start from weights of other shapes. As ``refuse_other_model``."""
    changes = _compare(found, config_toml)
    if not changes.same_shapes:
        way_on = f"Set [model] as in {found.path / paths.CONFIG}, or choose another checkpoint"
        raise mark_collective(MismatchError(f"checkpoint.load_path: {_described(found, changes)}\n{way_on}"))


def _compare(found: Candidate, config_toml: str) -> ModelChanges:
    stored = tomli.loads(found.config_toml).get("model")
    now = tomli.loads(config_toml).get("model")
    # A loop without the harness has no such section.
    return model_changes(stored, now) if stored is not None and now is not None else ModelChanges()


def _described(found: Candidate, changes: ModelChanges) -> str:
    lines = "".join(f"\n  {line}" for line in changes.lines)
    return f"{found.path} cannot fit this config: it is of another model:{lines}"
