"""Find what a load reads for a ``TrainState``, and apply it once all ranks have read it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kempnerforge.checkpoint.load.compatibility import check_fits
from kempnerforge.checkpoint.load.dcp_reader import SafetensorsReader
from kempnerforge.checkpoint.state.extra_state import PREFIX, ExtraTargets, like_present
from kempnerforge.checkpoint.state.model_state import ModelTargets, memory_of
from kempnerforge.checkpoint.state.optimizer_state import OptimizerTargets, StoredOptimizer, split_name
from kempnerforge.checkpoint.state.pieces import local_part
from kempnerforge.checkpoint.state.train_state import MODEL, OPTIMIZERS, TrainState
from kempnerforge.errors import MismatchError


@dataclass
class LoadTargets:
    """Tensors to fill, by name, and the state to apply afterwards."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """Names that only the checkpoint or only the program has."""
    model: ModelTargets = field(default_factory=ModelTargets)
    optimizers: list[OptimizerTargets] = field(default_factory=list)
    extras: ExtraTargets = field(default_factory=ExtraTargets)
    model_values: dict[str, Any] = field(default_factory=dict)
    """Entries of the model that are not plain tensors."""
    tied: list[tuple[str, str]] = field(default_factory=list)
    """Pairs of names that share one tensor here. The second is read separately and compared."""

    def check_tied(self) -> None:
        """Raise MismatchError if tied tensors have different values in the checkpoint. Call after reading."""
        for first, second in self.tied:
            if not torch.equal(local_part(self.tensors[first]), local_part(self.tensors[second])):
                raise MismatchError(
                    f"{first} and {second} are one tensor here, but have different values in the checkpoint: "
                    "it was saved without this tie"
                )

    def apply(self) -> None:
        """Apply what was read, extras last. Raise what their ``load_state_dict`` raises."""
        self.model.apply(self.model_values)
        for optimizer in self.optimizers:
            optimizer.apply()
        self.extras.apply()


def find_targets(
    state: TrainState,
    reader: SafetensorsReader,
    *,
    parts: Collection[str],
    excluded: Collection[str],
    rank: int,
    num_ranks: int,
) -> LoadTargets:
    """Return what this rank reads, after checking that it fits. ``parts``: of model, optimizer, extra.

    Not collective. Changes nothing. Rank 0 also checks for entries that no rank has. Raises
    MismatchError and DamagedCheckpointError.
    """
    found = LoadTargets()
    if "model" in parts:
        _add_model(found, state, reader)
        surplus = _model_surplus(found, state, reader) if rank == 0 else []
        # Check the model first: if it differs, so do the optimizer's groups, whose errors are less clear.
        check_fits(found.tensors, reader, [*found.problems, *surplus])
    if "optimizer" in parts:
        _add_optimizers(found, state, reader)
    if "extra" in parts:
        found.extras = state.extras.targets(
            reader, rank=rank, num_ranks=num_ranks, excluded=excluded, device=state.device
        )
        found.tensors |= found.extras.tensors
    surplus = _other_surplus(found, state, reader, parts) if rank == 0 else []
    check_fits(found.tensors, reader, [*found.problems, *surplus])
    return found


def _add_model(found: LoadTargets, state: TrainState, reader: SafetensorsReader) -> None:
    found.model = state.model.targets()
    for name, present in sorted(found.model.of_any_form.items()):
        full = MODEL + name
        if full in reader.raw_objects:
            encoded = reader.raw_objects[full]
        elif full in reader.index:
            device = present.device.type if isinstance(present, torch.Tensor) else "cpu"
            encoded = {"__tensor__": {"name": full, "device": device}}
        else:
            found.problems.append(f"{full} is not in the checkpoint")
            continue
        unpacker = like_present(lambda now=present: now, full, encoded, reader, state.device)
        found.model_values[name] = unpacker.unpack(encoded)
        found.tensors |= unpacker.tensors
    first_of: dict[tuple[Any, ...], str] = {}
    for name, tensor in found.model.tensors.items():
        full, memory = MODEL + name, memory_of(tensor)
        first = full
        if memory and tensor.numel():
            local = local_part(tensor)
            view = (memory, local.storage_offset(), local.shape, local.stride(), local.dtype)
            first = first_of.setdefault(view, full)
        if first != full:
            found.tied.append((first, full))
            tensor = torch.empty_like(tensor)
        found.tensors[full] = tensor


def _add_optimizers(found: LoadTargets, state: TrainState, reader: SafetensorsReader) -> None:
    objects, names = reader.raw_objects, state.model.names()
    several = objects.get("optimizers")
    if state.several_optimizers != isinstance(several, dict):
        kinds = {True: "several optimizers by name", False: "one optimizer"}
        there, here = kinds[isinstance(several, dict)], kinds[state.several_optimizers]
        raise MismatchError(f"{reader.path} has {there}, this program {here}")
    tables = {f"{OPTIMIZERS}{name}.": table for name, table in (several or {}).items()}
    if several is None:
        tables = {prefix: objects.get("optimizer") for prefix in state.optimizers}
    if tables.keys() != state.optimizers.keys():
        there, here = (
            sorted(prefix.split(".")[1] for prefix in group) for group in (tables, state.optimizers)
        )
        raise MismatchError(f"{reader.path} has the optimizers {there}, this program {here}")
    for prefix, optimizer in state.optimizers.items():
        known = optimizer.known_names(names)
        stored = StoredOptimizer.read(
            tables[prefix], objects, prefix=prefix, names=known, where=reader.path.name
        )
        targets = optimizer.targets(names, reader, stored)
        found.optimizers.append(targets)
        found.tensors |= targets.tensors
        found.problems += targets.problems
        unknown = sorted(stored.values.keys() - known)
        found.problems += [
            f"{prefix}state.{name} is in the checkpoint but not in this model" for name in unknown
        ]


def _model_surplus(found: LoadTargets, state: TrainState, reader: SafetensorsReader) -> list[str]:
    """Describe the model's entries in the checkpoint that no rank has."""
    others = {name for group in (state.groups or {}).values() for name in group}
    known = {MODEL + name for name in others} | found.tensors.keys()
    extra = [MODEL + rest for rest in reader.index.under(MODEL) if MODEL + rest not in known]
    if state.groups is None:
        objects = {name for name in reader.raw_objects if name.startswith(MODEL)}
        extra += sorted(objects - {MODEL + name for name in found.model.of_any_form})
    return _in_checkpoint_only(extra)


def _other_surplus(
    found: LoadTargets, state: TrainState, reader: SafetensorsReader, parts: Collection[str]
) -> list[str]:
    """Describe the entries of optimizers and extras in the checkpoint that the program lacks."""
    names, extra = state.model.names(), []
    for prefix, optimizer in state.optimizers.items() if "optimizer" in parts else ():
        known = optimizer.known_names(names)
        for rest in reader.index.under(prefix):
            if prefix + rest in found.tensors:
                continue
            if (
                not rest.startswith("state.")
                or split_name(rest.removeprefix("state."), known)[0] not in known
            ):
                extra.append(prefix + rest)
    for rest in reader.index.under(PREFIX) if "extra" in parts else ():
        name = rest.partition(".")[0]
        left_out = name in found.extras.excluded or name in state.extras.per_rank
        if not left_out and PREFIX + rest not in found.tensors:
            extra.append(PREFIX + rest)
    return _in_checkpoint_only(extra)


def _in_checkpoint_only(names: Sequence[str]) -> list[str]:
    return [f"{name} is in the checkpoint but not in this model" for name in names]
