"""A model's entries under the names that they have without wrappers, and how they come back."""

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

    Raises TypeError for what is not a module or is wrapped in FSDP1, whose parameters are slices of others,
    and ValueError for parts that have a name in common and for lazy parameters that have no shape yet.
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
        """What ``state_dict`` gives, by name, all parts together. Tensors are references if they can be.

        With ``copy_buffers`` those that a forward may change, which parameters are not, are copies.
        """
        found: dict[str, Any] = {}
        for part in self.parts:
            strip = _stripper(part)
            changing = {raw for raw, _ in part.named_buffers(remove_duplicate=False)} if copy_buffers else ()
            for raw, value in part.state_dict().items():
                name = strip(raw)
                if name in found:
                    raise ValueError(
                        f"two parts of the model have {name}: give their modules different names"
                    )
                is_tensor = copy_buffers and isinstance(value, torch.Tensor)
                found[name] = value.clone() if is_tensor and (raw in changing or _is_extra(raw)) else value
        return found

    def names(self) -> dict[torch.Tensor, str]:
        """Parameter -> name. A tied parameter has the first of its names."""
        found: dict[torch.Tensor, str] = {}
        for part in self.parts:
            strip = _stripper(part)
            for raw, parameter in part.named_parameters():
                found.setdefault(parameter, strip(raw))
        return found

    def replicated(self) -> set[str]:
        """Names in a checkpoint of the tensors that ``DistributedDataParallel`` keeps equal on all ranks."""
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

        A module that hands out entries under names of its own is taken to have it in one of them.
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
                    f"{name} is {parameter.dtype}, and state_dict() of model= gives it as {entry.dtype}: a "
                    "resume would round it"
                )
            if entry is None and memory_of(parameter) not in storages:
                raise ValueError(
                    f"{name} is trained by optimizer=, and state_dict() of model= leaves it out: a resume "
                    "would lose it"
                )

    def targets(self) -> ModelTargets:
        """Where a load puts what it reads."""
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
                # A rank that holds nothing of a sharded tensor goes by its name: all ranks must decide alike.
                storage = memory_of(value)
                is_own = storage in storages if storage else raw in own
                if value.numel() and not is_own:
                    # A copy that a hook made: filling it would not fill the parameter.
                    value = torch.empty_like(value)
                    through_load = True
                found.tensors[name] = value
            if through_load:
                found.through_load.append((part, entries))
        return found


@dataclass
class ModelTargets:
    """Tensors to fill and, for modules that hand out anything but their own tensors, what to call then."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    of_any_form: dict[str, Any] = field(default_factory=dict)
    """What is not a tensor, or may change its shape (``get_extra_state``): name -> value of now."""
    through_load: list[tuple[nn.Module, dict[str, str]]] = field(default_factory=list)
    """Modules that must be loaded through ``load_state_dict``, with name -> their own name for it."""

    def apply(self, others: Mapping[str, Any]) -> None:
        """Hand over what was read. ``others``: the values of the entries of any form. Raises RuntimeError."""
        values = {**self.tensors, **others}
        for part, raw_names in self.through_load:
            state = OrderedDict((raw, values[name]) for name, raw in raw_names.items())
            own = part.state_dict()
            # Modules take a state without versions for one of an old version, and convert it.
            state._metadata = getattr(own, "_metadata", {})  # type: ignore[attr-defined]
            # What the module does not hand out itself, a frozen base say, cannot be in the checkpoint.
            is_own = not _is_of_torch(type(part).load_state_dict)
            told = part.load_state_dict(state) if is_own else part.load_state_dict(state, strict=False)
            missing = [name for name in getattr(told, "missing_keys", ()) if name in own]
            if wrong := [*missing, *getattr(told, "unexpected_keys", ())]:
                raise RuntimeError(
                    f"load_state_dict of {type(part).__name__} did not take {', '.join(wrong)}"
                )


def _own_tensors(part: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by the module's own names, tied ones under each."""
    return {
        **dict(part.named_parameters(remove_duplicate=False)),
        **dict(part.named_buffers(remove_duplicate=False)),
    }


def _inside(name: str) -> str:
    """What the names in the same module begin with."""
    module = name.rpartition(".")[0]
    return f"{module}." if module else ""


def _is_extra(name: str) -> bool:
    return name.rpartition(".")[2] == "_extra_state"


def _load_has_effects(part: nn.Module) -> bool:
    """Whether loading it does more than filling tensors: hooks, or methods of a user's own."""
    for module in part.modules():
        hooks = (*module._load_state_dict_pre_hooks.values(), *module._load_state_dict_post_hooks.values())
        if any(not _is_of_torch(getattr(hook, "hook", hook)) for hook in hooks):
            return True
        if not _is_of_torch(type(module)._load_from_state_dict):
            return True
    return not _is_of_torch(type(part).load_state_dict)


def _is_of_torch(function: Any) -> bool:
    """Whether it is torch's: torch's own hooks take names apart, and fill nothing."""
    function = getattr(function, "func", function)
    return str(getattr(function, "__module__", "")).partition(".")[0] == "torch"


def memory_of(tensor: torch.Tensor) -> int:
    """Address of the storage of a tensor, or of this rank's part of it; 0 if it has no memory of its own."""
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
            "Use fully_shard (FSDP2), or hand it over as extra= (docs/guide/recipes.md)"
        )


def _stripper(part: nn.Module) -> Callable[[str], str]:
    """Takes the prefixes that wrappers add out of the names of a module's parameters and entries.

    The module is searched for wrappers at the first name that may have such a prefix: a search takes a while.
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
    """Where wrappers are in a module -> the attribute that holds what they wrap."""
    found: dict[str, str] = {}
    for prefix, module in part.named_modules(remove_duplicate=False):
        if (attribute := _wrapped_in(module)) is not None:
            found[prefix] = attribute
            # Wrappers for activation checkpointing leave their own prefix out of names.
            found[prefix.replace("_checkpoint_wrapped_module.", "")] = attribute
    return found


def _wrapped_in(module: nn.Module) -> str | None:
    """The attribute that holds the wrapped module; None for a module that wraps none."""
    if isinstance(module, (DataParallel, DistributedDataParallel)):
        return "module"
    # By its name: importing torch.compile's machinery takes a second.
    return "_orig_mod" if type(module).__name__ == "OptimizedModule" else None
