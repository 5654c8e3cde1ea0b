"""Save and load the ``state_dict`` entries of a model, under names without wrapper prefixes."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy


class ModelState:
    """The parts of a model that this rank holds: all of it, or its stages of a pipeline.

    Raises TypeError for anything that is not a module, or is wrapped in FSDP1, whose parameters are
    slices of others. Raises ValueError for parts with a common name, and for lazy parameters
    without a shape.
    """

    def __init__(self, model: nn.Module | Sequence[nn.Module]) -> None:
        if not isinstance(model, (nn.Module, Sequence)):
            raise TypeError(f"model= takes a module or a sequence of modules, not {model!r}")
        self.parts = (model,) if isinstance(model, nn.Module) else tuple(model)
        for part in self.parts:
            if not isinstance(part, nn.Module):
                raise TypeError(f"model= takes a module or a sequence of modules, not {type(part).__name__}")
            _refuse_fsdp1(part)
            for name, tensor in _own_tensors(part).items():
                if is_lazy(tensor):
                    raise ValueError(
                        f"{name} of model= has no shape yet: call the model once before TrainState"
                    )
        self.entries()

    def entries(self, *, copy_buffers: bool = False) -> dict[str, Any]:
        """Return ``state_dict`` of all parts together, by name. Tensors are references where possible.

        ``copy_buffers``: copy the tensors that a forward may change: buffers and extra state, but
        not parameters.
        """
        found: dict[str, Any] = {}
        for part in self.parts:
            strip = _stripper(part)
            changing = {raw for raw, _ in part.named_buffers(remove_duplicate=False)} if copy_buffers else ()
            for raw, value in part.state_dict().items():
                name = strip(raw)
                if name in found:
                    raise ValueError(f"two parts of the model have {name}: give their modules distinct names")
                is_tensor = copy_buffers and isinstance(value, torch.Tensor)
                found[name] = value.clone() if is_tensor and (raw in changing or _is_extra(raw)) else value
        return found

    def names(self) -> dict[torch.Tensor, str]:
        """Return parameter -> name. A tied parameter has the first of its names."""
        found: dict[torch.Tensor, str] = {}
        for part in self.parts:
            strip = _stripper(part)
            for raw, parameter in part.named_parameters():
                found.setdefault(parameter, strip(raw))
        return found

    def frozen(self) -> set[str]:
        """Return the names of parameters that require no gradient."""
        found: set[str] = set()
        for part in self.parts:
            strip = _stripper(part)
            named = part.named_parameters(remove_duplicate=False)
            found |= {strip(raw) for raw, parameter in named if not parameter.requires_grad}
        return found

    def replicated(self) -> set[str]:
        """Return the names of the tensors that ``DistributedDataParallel`` keeps equal on all ranks."""
        found: set[str] = set()
        for part in self.parts:
            strip = _stripper(part)
            for prefix, module in part.named_modules():
                if isinstance(module, DistributedDataParallel):
                    ignored = module.parameters_to_ignore
                    for raw, _ in module.module.named_parameters():
                        if raw not in ignored:
                            found.add(strip(f"{prefix}.module.{raw}" if prefix else f"module.{raw}"))
        return {f"model.{name}" for name in found}

    def check_stored(self, trained: Iterable[torch.Tensor]) -> None:
        """Raise ValueError for a trained parameter that ``state_dict`` leaves out: a resume would lose it.

        If a module renames its entries, one of them is assumed to contain the parameter.
        """
        names, entries = self.names(), self.entries()
        storages = {memory_of(value) for value in entries.values() if isinstance(value, torch.Tensor)} - {0}
        own = {strip(raw) for part in self.parts for strip in [_stripper(part)] for raw in _own_tensors(part)}
        renaming = tuple(_inside(name) for name in entries.keys() - own if not _is_extra(name))
        for parameter in trained:
            name = names.get(parameter)
            if name is None or name.startswith(renaming):
                continue
            entry = entries.get(name)
            if isinstance(entry, torch.Tensor) and entry.dtype != parameter.dtype:
                raise ValueError(
                    f"{name} is {parameter.dtype}, but state_dict() of model= returns it as {entry.dtype}: a "
                    "resume would round it"
                )
            if entry is None and memory_of(parameter) not in storages:
                raise ValueError(
                    f"{name} is trained by optimizer=, but state_dict() of model= leaves it out: a resume "
                    "would lose it"
                )

    def targets(self) -> ModelTargets:
        """Return what a load has to read, and where to put it."""
        found = ModelTargets()
        for part in self.parts:
            strip, entries = _stripper(part), {}
            own = {raw: memory_of(tensor) for raw, tensor in _own_tensors(part).items()}
            storages = {*own.values()} - {0}
            through_load = _load_has_effects(part)
            for raw, value in part.state_dict().items():
                name = strip(raw)
                entries[name] = raw
                if not isinstance(value, torch.Tensor) or _is_extra(raw):
                    found.of_any_form[name] = value
                    through_load = True
                    continue
                # A rank without a part of a sharded tensor has no storage to compare. It decides by name, so
                # that all ranks agree.
                storage = memory_of(value)
                is_own = storage in storages if storage else raw in own
                if value.numel() and not is_own:
                    # A copy made by a hook: filling it would not fill the parameter.
                    value = torch.empty_like(value)
                    through_load = True
                found.tensors[name] = value
            if through_load:
                found.through_load.append((part, entries))
        return found


@dataclass
class ModelTargets:
    """Tensors to fill, and modules whose ``load_state_dict`` has to be called afterwards."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    of_any_form: dict[str, Any] = field(default_factory=dict)
    """Values that are not tensors, or may change shape (``get_extra_state``): name -> current value."""
    through_load: list[tuple[nn.Module, dict[str, str]]] = field(default_factory=list)
    """Modules that must be loaded through ``load_state_dict``, with name -> the module's own name."""

    def apply(self, others: Mapping[str, Any]) -> None:
        """Apply what was read. ``others``: the values of ``of_any_form``. Raises RuntimeError."""
        values = {**self.tensors, **others}
        for part, raw_names in self.through_load:
            state = OrderedDict((raw, values[name]) for name, raw in raw_names.items())
            own = part.state_dict()
            # Without the versions in the metadata, modules would convert the state as if it were old.
            state._metadata = getattr(own, "_metadata", {})  # type: ignore[attr-defined]
            # Entries that state_dict() leaves out, such as a frozen base, are not in the checkpoint.
            is_own = not _is_of_torch(type(part).load_state_dict)
            result = part.load_state_dict(state) if is_own else part.load_state_dict(state, strict=False)
            missing = [name for name in getattr(result, "missing_keys", ()) if name in own]
            if wrong := [*missing, *getattr(result, "unexpected_keys", ())]:
                raise RuntimeError(
                    f"load_state_dict of {type(part).__name__} did not take {', '.join(wrong)}"
                )


def _own_tensors(part: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and buffers by the module's own names. Tied ones are listed under each name."""
    return {
        **dict(part.named_parameters(remove_duplicate=False)),
        **dict(part.named_buffers(remove_duplicate=False)),
    }


def _inside(name: str) -> str:
    """Return the prefix that all names of the same module have."""
    module = name.rpartition(".")[0]
    return f"{module}." if module else ""


def _is_extra(name: str) -> bool:
    return name.rpartition(".")[2] == "_extra_state"


def _load_has_effects(part: nn.Module) -> bool:
    """Return whether loading does more than fill tensors, because of hooks or overridden methods."""
    for module in part.modules():
        hooks = (*module._load_state_dict_pre_hooks.values(), *module._load_state_dict_post_hooks.values())
        if any(not _is_of_torch(getattr(hook, "hook", hook)) for hook in hooks):
            return True
        if not _is_of_torch(type(module)._load_from_state_dict):
            return True
    return not _is_of_torch(type(part).load_state_dict)


def _is_of_torch(function: Any) -> bool:
    """Return whether a function belongs to torch, whose own hooks only change names."""
    function = getattr(function, "func", function)
    return str(getattr(function, "__module__", "")).partition(".")[0] == "torch"


def memory_of(tensor: torch.Tensor) -> int:
    """Return the address of a tensor's storage on this rank; 0 if it has no memory of its own."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # it has no memory of its own
        return 0


def _refuse_fsdp1(part: nn.Module) -> None:
    fsdp1 = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    if fsdp1 is not None and any(
        isinstance(module, fsdp1.FullyShardedDataParallel) for module in part.modules()
    ):
        raise TypeError(
            "model= is wrapped in FullyShardedDataParallel (FSDP1), whose parameters are slices of others. "
            "Use fully_shard (FSDP2), or pass it as extra= (docs/guide/recipes.md)"
        )


def _stripper(part: nn.Module) -> Callable[[str], str]:
    """Return a function that removes the prefixes of wrappers from names of parameters and entries.

    The search for wrappers is slow, so it is only done once a name may have such a prefix.
    """
    wrappers: dict[str, str] | None = None

    def strip(name: str) -> str:
        nonlocal wrappers
        if "_orig_mod." not in name and "module." not in name:
            return name
        if wrappers is None:
            wrappers = _find_wrappers(part)
        kept, prefix = [], ""
        for piece in name.split("."):
            if wrappers.get(prefix) != piece:
                kept.append(piece)
            prefix = f"{prefix}.{piece}" if prefix else piece
        return ".".join(kept)

    return strip


def _find_wrappers(part: nn.Module) -> dict[str, str]:
    """Return, for each wrapper in a module: its path -> the attribute that holds the wrapped module."""
    found: dict[str, str] = {}
    for prefix, module in part.named_modules(remove_duplicate=False):
        if (attribute := _wrapped_in(module)) is not None:
            found[prefix] = attribute
            # Wrappers for activation checkpointing remove their own prefix from names.
            found[prefix.replace("_checkpoint_wrapped_module.", "")] = attribute
    return found


def _wrapped_in(module: nn.Module) -> str | None:
    """Return the attribute that holds the wrapped module; None for a module that is not a wrapper."""
    if isinstance(module, (DataParallel, DistributedDataParallel)):
        return "module"
    # Compare the name: importing the class takes a second.
    return "_orig_mod" if type(module).__name__ == "OptimizedModule" else None
