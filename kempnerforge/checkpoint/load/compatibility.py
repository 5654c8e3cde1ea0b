"""Check whether a step fits the config and the state of this run.

Each rank reads only the index entries that it needs.
"""

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

_MAX_SHOWN = 8


def refuse_other_model(candidate: Candidate, config_toml: str) -> None:
    """Raise MismatchError if the step holds another model, even one whose tensors have the same shapes.

    Not collective, but all ranks compare the same two configs and so raise together.
    """
    changes = _compare_models(candidate, config_toml)
    if not changes.lines:
        return
    cure = "To resume this run, restore [model]. To train the other model, give the run another name"
    if changes.same_shapes:
        cure += f"; it can start from these weights: --run.name=NEW --checkpoint.load_path={candidate.path}"
    else:
        cure += " (--run.name=NEW)"
    raise mark_collective(MismatchError(f"{_describe(candidate, changes)}\n{cure}"))


def refuse_other_shapes(candidate: Candidate, config_toml: str) -> None:
    """Raise MismatchError if a warm start names weights of other shapes. See ``refuse_other_model``."""
    changes = _compare_models(candidate, config_toml)
    if not changes.same_shapes:
        cure = f"Set [model] as in {candidate.path / paths.CONFIG}, or choose another checkpoint"
        raise mark_collective(MismatchError(f"checkpoint.load_path: {_describe(candidate, changes)}\n{cure}"))


def _compare_models(candidate: Candidate, config_toml: str) -> ModelChanges:
    stored = tomli.loads(candidate.config_toml).get("model")
    now = tomli.loads(config_toml).get("model")
    # The config of a user's own loop has no [model].
    return model_changes(stored, now) if stored is not None and now is not None else ModelChanges()


def _describe(candidate: Candidate, changes: ModelChanges) -> str:
    lines = "".join(f"\n  {line}" for line in changes.lines)
    return f"{candidate.path} does not fit this config: it holds another model:{lines}"


def check_parts(parts: Sequence[str], reader: SafetensorsReader) -> None:
    """Raise MismatchError if the step lacks a requested part, because it holds only weights.

    The random number generators may be missing. They are then derived from (seed, step, rank), as
    after a change of layout.
    """
    if absent := missing_parts(parts, reader.raw_objects, reader.index.has_prefix):
        raise only_weights(reader.path, absent)


def check_fits(
    wanted: Mapping[str, torch.Tensor], reader: SafetensorsReader, known_problems: Sequence[str] = ()
) -> None:
    """Raise MismatchError unless the step has these tensors, with these shapes and dtypes."""
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
    if not problems:
        return
    shown = "".join(f"\n  {problem}" for problem in problems[:_MAX_SHOWN])
    more = f"\n  and {len(problems) - _MAX_SHOWN} more" if len(problems) > _MAX_SHOWN else ""
    raise MismatchError(
        f"{reader.path} does not fit this config ({len(problems)} tensors differ):{shown}{more}\n"
        f"The config that it was saved with: {reader.path / paths.CONFIG}"
    )


def check_data(
    reader: SafetensorsReader, state: TrainState, context: RunContext
) -> tuple[list[str], list[str]]:
    """Return a line for each difference from the data that the step was trained on, and for each
    difference of the data that follow.

    Raises MismatchError for a step without a position in the data, and for changed data unless the
    config allows it.
    """
    try:
        data = reader.objects["data"]
        stored = data["fingerprint"]
    except (KeyError, TypeError):
        raise MismatchError(f"{reader.path} was saved without a position in the data") from None
    samples = data.get("cursor", {}).get("samples", 0)
    changes, additions = context.explain_data(stored, state.fingerprint, samples)
    if changes and not context.allow_changed_data:
        raise MismatchError(
            f"{reader.path} was trained on other data:\n  "
            + "\n  ".join(changes)
            + "\nTo continue with the data of this config, add --data.allow_changed=true"
        )
    return changes, additions
