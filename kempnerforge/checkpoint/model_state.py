"""A model's entries under the names that they have without wrappers, and how they come back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel


class ModelState:
    """The parts of a model that this rank holds: all of it, or its stages of a pipeline.

    Raises TypeError for what is no module or is wrapped in FSDP1, whose parameters are slices of others, and
    ValueError for parts that have a name in common.
    """

    def __init__(self, model: nn.Module | Sequence[nn.Module]) -> None:
        self.parts = (model,) if isinstance(model, nn.Module) else tuple(model)
        for part in self.parts:
            if not isinstance(part, nn.Module):
                raise TypeError(f"model= takes a module or a sequence of modules, not {type(part).__name__}")
            _refuse_fsdp1(part)
        self.entries()

    def entries(self) -> dict[str, Any]:
        """What ``state_dict`` gives, by name, all parts together. Tensors are references if they can be."""
        found: dict[str, Any] = {}
        for part in self.parts:
            strip = _stripper(part)
            for raw, value in part.state_dict().items():
                name = strip(raw)
                if name in found:
                    raise ValueError(
                        f"two parts of the model have {name}: give their modules different names"
                    )
                found[name] = value
        return found

    def names(self) -> dict[torch.Tensor, str]:
        """Parameter -> name. A tied parameter has the first of its names."""
        found: dict[torch.Tensor, str] = {}
        for part in self.parts:
            strip = _stripper(part)
            for raw, parameter in part.named_parameters():
                found.setdefault(parameter, strip(raw))
        return found

    def targets(self) -> ModelTargets:
        """Where a load puts what it reads."""
        found = ModelTargets()
        for part in self.parts:
            strip, entries, foreign = _stripper(part), {}, []
            owned = {_storage(tensor) for tensor in (*part.parameters(), *part.buffers())}
            for raw, value in part.state_dict().items():
                name = strip(raw)
                entries[name] = raw
                if not isinstance(value, torch.Tensor):
                    found.others.add(name)
                    foreign.append(name)
                    continue
                if value.numel() and _storage(value) not in owned:
                    # A copy that a hook made: filling it would not fill the parameter.
                    value = torch.empty_like(value)
                    foreign.append(name)
                found.tensors[name] = value
            if foreign:
                found.through_load.append((part, entries))
        return found


@dataclass
class ModelTargets:
    """Tensors to fill and, for modules that hand out anything but their own tensors, what to call then."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    others: set[str] = field(default_factory=set)
    """Names of the entries that are no tensors."""
    through_load: list[tuple[nn.Module, dict[str, str]]] = field(default_factory=list)
    """Modules that must be loaded through ``load_state_dict``, with name -> their own name for it."""

    def apply(self, others: Mapping[str, Any]) -> None:
        """Hand over what was read. ``others``: the values of the entries that are no tensors."""
        values = {**self.tensors, **others}
        for part, raw_names in self.through_load:
            part.load_state_dict({raw: values[name] for name, raw in raw_names.items()})


def _storage(tensor: torch.Tensor) -> int:
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # it has no memory of its own
        return 0


def _refuse_fsdp1(part: nn.Module) -> None:
    fsdp1 = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    if fsdp1 is not None and any(isinstance(one, fsdp1.FullyShardedDataParallel) for one in part.modules()):
        raise TypeError(
            "model= is wrapped in FullyShardedDataParallel (FSDP1), whose parameters are slices of others. "
            "Use fully_shard (FSDP2), or hand it over as extra= (docs/recipes.md)"
        )


def _stripper(part: nn.Module) -> Callable[[str], str]:
    """Takes the prefixes that wrappers add out of the names of a module's parameters and entries."""
    wrappers: dict[str, str] = {}
    for prefix, module in part.named_modules(remove_duplicate=False):
        if (attribute := _wrapped_in(module)) is not None:
            wrappers[prefix] = attribute
            # Wrappers for activation checkpointing leave their own prefix out of names.
            wrappers[prefix.replace("_checkpoint_wrapped_module.", "")] = attribute

    def strip(name: str) -> str:
        kept, prefix = [], ""
        for piece in name.split("."):
            if wrappers.get(prefix) != piece:
                kept.append(piece)
            prefix = f"{prefix}.{piece}" if prefix else piece
        return ".".join(kept)

    return strip if wrappers else _as_it_is


def _as_it_is(name: str) -> str:
    return name


def _wrapped_in(module: nn.Module) -> str | None:
    """The attribute that holds the wrapped module; None for a module that wraps none."""
    if isinstance(module, (DataParallel, DistributedDataParallel)):
        return "module"
    # By its name: importing torch.compile's machinery takes a second.
    return "_orig_mod" if type(module).__name__ == "OptimizedModule" else None
