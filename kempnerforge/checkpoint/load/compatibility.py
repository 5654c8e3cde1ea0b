"""Whether a step can fill the state of this run. No rank reads more of the index than it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import tomli
import torch

from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.format.dtypes import DTYPE_NAMES
from kempnerforge.checkpoint.load.candidates import Candidate
from kempnerforge.checkpoint.load.dcp_reader import SafetensorsReader
from kempnerforge.checkpoint.load.load_path import missing_parts, only_weights
from kempnerforge.checkpoint.results import RunContext
from kempnerforge.checkpoint.state.train_state import TrainState
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


def check_parts(parts: Sequence[str], reader: SafetensorsReader) -> None:
    """Raise MismatchError when the step has nothing of a part that is asked for: it holds weights only.

    Generators may be missing: they are derived then, as under another layout.
    """
    if absent := missing_parts(parts, reader.raw_objects, reader.index.has_prefix):
        raise only_weights(reader.path, absent)


def check_fits(
    wanted: Mapping[str, torch.Tensor], reader: SafetensorsReader, known_problems: Sequence[str] = ()
) -> None:
    """Raise MismatchError unless the step has these tensors, of these shapes and dtypes."""
    problems = list(known_problems)
    for name, tensor in wanted.items():
        here = (DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
        try:
            dtype, shape = reader.index.head(name)
        except KeyError:
            problems.append(f"{name} is not in the checkpoint")
            continue
        if shape != here[1]:
            problems.append(f"{name} has shape {shape} in the checkpoint, {here[1]} here")
        elif dtype != here[0]:
            problems.append(f"{name} is {dtype} in the checkpoint, {here[0]} here")
    _raise_misfits(problems, reader)


def _raise_misfits(problems: Sequence[str], reader: SafetensorsReader) -> None:
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:8])
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise MismatchError(
            f"{reader.path} cannot fit this config ({len(problems)} tensors differ):{shown}{more}\n"
            f"The config that it was saved with: {reader.path / paths.CONFIG}"
        )


def check_data(reader: SafetensorsReader, state: TrainState, context: RunContext) -> list[str]:
    try:
        stored = reader.objects["data"]["fingerprint"]
    except (KeyError, TypeError):
        raise MismatchError(f"{reader.path} was saved without a position in the data") from None
    changes = context.explain_data(stored, state.fingerprint)
    if changes and not context.allow_changed_data:
        raise MismatchError(
            f"{reader.path} was trained on other data:\n  "
            + "\n  ".join(changes)
            + "\nTo go on with the data of this config, add --data.allow_changed=true"
        )
    return changes


def _compare(found: Candidate, config_toml: str) -> ModelChanges:
    stored = tomli.loads(found.config_toml).get("model")
    now = tomli.loads(config_toml).get("model")
    # A loop without the harness has no such section.
    return model_changes(stored, now) if stored is not None and now is not None else ModelChanges()


def _described(found: Candidate, changes: ModelChanges) -> str:
    lines = "".join(f"\n  {line}" for line in changes.lines)
    return f"{found.path} cannot fit this config: it is of another model:{lines}"
