"""Save and load an optimizer's state and groups under the names of parameters.

State is everything in ``optimizer.state`` and ``optimizer.param_groups``. A load creates the state
that the checkpoint has and the optimizer has not created yet. Unlike torch's
``set_optimizer_state_dict``, it takes no optimizer step to do so.

=====================================  =======================================================================
in the checkpoint                      content
=====================================  =======================================================================
``optimizer.state.<parameter>.<key>``  a tensor; other values are entries of ``train_state.json``
``optimizer.global.<key>``             state that belongs to no parameter
``"optimizer"`` in the JSON            ``class``; ``groups``: all keys of each group, ``params`` by name;
                                       ``on_host``: keys of tensors on the CPU although the parameter is on
                                       another device; ``empty``: parameters whose state has no keys yet;
                                       ``same``: tensors that are shared with another key; ``parameters``:
                                       tensors that are ``nn.Parameter`` or require gradients;
                                       ``schedule_free``: the optimizer has evaluation weights
``optimizers.<name>.state...``         the same for each of a dict of optimizers, under ``"optimizers"``
=====================================  =======================================================================
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from kempnerforge.checkpoint.format.json_values import MALFORMED
from kempnerforge.checkpoint.state import optimizer_layout
from kempnerforge.checkpoint.state.model_state import memory_of
from kempnerforge.checkpoint.state.stored_step import StoredStep
from kempnerforge.checkpoint.state.tensor_leaves import Packer, Unpacker, tensor_names
from kempnerforge.errors import DamagedCheckpointError, MismatchError

_UNKNOWN: tuple[Callable[[], Any], list[bool]] = (lambda: None, [])
Names = Mapping[torch.Tensor, str]
"""Parameter -> name."""
_NOT_HYPERPARAMETERS = ("params", "param_names")


class OptimizerState:
    """One optimizer, under ``prefix`` (``optimizer.``, or ``optimizers.<name>.``).

    Args:
        groups: only if a rank has a part of the model: the ``name`` of each group -> the names of
            its parameters in the whole model.
        kept: keys of groups that a load leaves as the program has them. None: load all keys, as
            torch does.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        prefix: str,
        groups: Mapping[str, Sequence[str]] | None = None,
        kept: Collection[str] | None = None,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                "optimizer= takes torch.optim.Optimizer, or a dict or list of them, not "
                f"{type(optimizer).__name__}"
            )
        self.optimizer = optimizer
        self.prefix = prefix
        self._groups = groups
        self._kept = kept
        self._known: dict[str, tuple[Callable[[], Any], list[bool]]] = {}
        """Checked state: name -> weak reference, and whether it is a parameter and requires gradients."""

    # -- save --------------------------------------------------------------------------------------------

    def pack(self, names: Names, packer: Packer, objects: dict[str, Any]) -> dict[str, Any]:
        """Add the state to ``packer`` and ``objects``. Return a description of the groups, as JSON.

        Raises TypeError or ValueError, which names the value, for a value that a load could not
        restore.
        """
        on_host: set[str] = set()
        empty: list[str] = []
        shared: dict[int, str] = {}
        same: dict[str, str] = {}
        parameters: dict[str, list[bool]] = {}
        for owner, state in self.optimizer.state.items():
            if isinstance(owner, str):
                objects[f"{self.prefix}global.{owner}"] = _pack(state, f"{self.prefix}global.{owner}", packer)
                continue
            parameter = self._name(owner, names)
            base = f"{self.prefix}state.{parameter}."
            if not isinstance(state, Mapping):
                raise TypeError(
                    f"{base[:-1]} is a {type(state).__name__}: state of a parameter must be a dict"
                )
            if not state:
                empty.append(parameter)
            for key, value in state.items():
                if type(key) is not str or not key:
                    raise TypeError(f"{base}{key!r}: a key of optimizer state must be a string")
                if isinstance(value, torch.Tensor):
                    if (first := shared.setdefault(id(value), base + key)) != base + key:
                        same[base + key] = first
                        continue
                    known, flags = self._known.get(base + key, _UNKNOWN)
                    if known() is not value:
                        optimizer_layout.check_layout(base + key, value, owner, key)
                        flags = [isinstance(value, nn.Parameter), value.requires_grad]
                        self._known[base + key] = (weakref.ref(value), flags)
                    packer.add(base + key, value)
                    if True in flags:
                        parameters[base + key] = flags
                    if value.device.type == "cpu" != owner.device.type:
                        on_host.add(key)
                else:
                    objects[base + key] = _pack(value, base + key, packer)
        groups = [
            {
                **{
                    key: _pack(value, f"{self.prefix}groups.{number}.{key}", packer)
                    for key, value in group.items()
                    if key not in _NOT_HYPERPARAMETERS
                },
                "params": self._group_names(number, names),
            }
            for number, group in enumerate(self.optimizer.param_groups)
        ]
        table: dict[str, Any] = {"groups": groups, "class": kind_of(self.optimizer)}
        if on_host:
            table["on_host"] = sorted(on_host)
        if empty:
            table["empty"] = empty
        if same:
            table["same"] = same
        if parameters:
            table["parameters"] = parameters
        if all(callable(getattr(self.optimizer, name, None)) for name in ("eval", "train")):
            table["schedule_free"] = True
        return table

    def _group_names(self, number: int, names: Names) -> list[str]:
        group = self.optimizer.param_groups[number]
        if self._groups is not None:
            return list(self._groups[group["name"]])
        return [self._name(parameter, names) for parameter in group["params"]]

    def _name(self, parameter: Any, names: Names) -> str:
        if isinstance(parameter, torch.Tensor) and parameter in names:
            return names[parameter]
        for number, group in enumerate(self.optimizer.param_groups):
            for position, member in enumerate(group["params"]):
                if member is parameter:
                    raise ValueError(
                        f"parameter {position} of group {number} of {type(self.optimizer).__name__}, of "
                        f"shape {tuple(member.shape)}, is not in model=. Pass all modules that it trains as "
                        "model="
                    )
        raise ValueError(
            f"{type(self.optimizer).__name__} has state of a {type(parameter).__name__} that is in none of "
            "its groups"
        )

    # -- load --------------------------------------------------------------------------------------------

    def known_names(self, names: Names) -> set[str]:
        """Return the names of all parameters, including those of other ranks."""
        others = {name for group in (self._groups or {}).values() for name in group}
        return others | {
            names[member]
            for group in self.optimizer.param_groups
            for member in group["params"]
            if member in names
        }

    def targets(self, names: Names, reader: StoredStep, stored: StoredOptimizer) -> OptimizerTargets:
        """Return what to read, and where to put it. Raises MismatchError if the program has other groups."""
        if stored.kind not in (None, kind_of(self.optimizer)):
            raise MismatchError(
                f"{self.prefix.rstrip('.')} is {kind_of(self.optimizer)} here and {stored.kind} in the "
                "checkpoint. To start a new run from its weights, set checkpoint.load_path to it, and "
                'checkpoint.exclude_from_loading = ["optimizer"]'
            )
        self._check_groups(stored, names)
        found = OptimizerTargets(self)
        unpacker = Unpacker(reader.make_tensor)
        taken = {memory_of(parameter) for parameter in names}
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                name = names[parameter]
                here, there = self.optimizer.state.get(parameter, {}), stored.values.get(name, {})
                state: dict[str, Any] = {}
                for key in stored.tensor_keys(f"{self.prefix}state.{name}.", reader):
                    full = f"{self.prefix}state.{name}.{key}"
                    source = stored.same.get(full, full)
                    if source not in found.tensors:
                        value = _reused(here.get(key), taken)
                        if value is None:
                            head = reader.index.head(source)
                            value = optimizer_layout.make(parameter, key, head, group, stored.on_host)
                        found.tensors[source] = value
                    state[key] = _as_it_was(found.tensors[source], here.get(key), stored.parameters.get(full))
                state.update({key: unpacker.unpack(value) for key, value in there.items()})
                if self._kept is not None:
                    found.problems += [
                        f"{self.prefix}state.{name}.{key} is not in the checkpoint"
                        for key in here
                        if key not in state
                    ]
                if state or name in stored.empty:
                    found.state[parameter] = state
        for key, value in stored.of_all.items():
            found.state[key] = unpacker.unpack(value)
        for group, table in zip(self.optimizer.param_groups, stored.groups, strict=True):
            found.groups.append(
                {
                    key: unpacker.unpack(value)
                    for key, value in table.items()
                    if key not in _NOT_HYPERPARAMETERS and not (key in (self._kept or ()) and key in group)
                }
            )
        found.tensors |= unpacker.tensors
        return found

    def _check_groups(self, stored: StoredOptimizer, names: Names) -> None:
        here = [self._group_names(number, names) for number in range(len(self.optimizer.param_groups))]
        there = [table["params"] for table in stored.groups]
        if here == there:
            return
        what = f"{self.prefix.rstrip('.')} of {type(self.optimizer).__name__}"
        if len(here) != len(there):
            more, less = ("checkpoint", "program") if len(there) > len(here) else ("program", "checkpoint")
            extra = (there if len(there) > len(here) else here)[min(len(here), len(there))]
            raise MismatchError(
                f"{what} has {len(there)} groups in the checkpoint, {len(here)} here: only the {more} has a "
                f"group of {_some(extra)}, which the {less} lacks. Create the same groups (add_param_group) "
                "before resume"
            )
        for number, (mine, theirs) in enumerate(zip(here, there, strict=True)):
            only_here, only_there = sorted({*mine} - {*theirs}), sorted({*theirs} - {*mine})
            if only_here or only_there:
                raise MismatchError(
                    f"group {number} of {what} has other parameters than in the checkpoint: "
                    f"only here {_some(only_here)}; only in the checkpoint {_some(only_there)}"
                )
            if mine != theirs:
                raise MismatchError(f"group {number} of {what} has its parameters in another order")


@dataclass
class OptimizerTargets:
    """What a load reads for one optimizer, and where to put it."""

    owner: OptimizerState
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    state: dict[Any, Any] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Tensors that the program has but the checkpoint lacks, if ``kept`` is set."""

    def apply(self) -> None:
        """Set the optimizer's state and groups, once the tensors are filled."""
        optimizer = self.owner.optimizer
        optimizer.state.clear()
        optimizer.state.update(self.state)
        for group, loaded in zip(optimizer.param_groups, self.groups, strict=True):
            for key, value in loaded.items():
                here = group.get(key)
                if (
                    isinstance(here, torch.Tensor)
                    and isinstance(value, torch.Tensor)
                    and (here.shape, here.dtype) == (value.shape, value.dtype)
                ):
                    here.detach().copy_(
                        value
                    )  # update it in place for other holders, such as a captured graph
                else:
                    group[key] = value


@dataclass(frozen=True)
class StoredOptimizer:
    """The entries of ``train_state.json`` for one optimizer."""

    kind: str | None
    """Name of its class; None in early versions."""
    groups: list[dict[str, Any]]
    on_host: frozenset[str] | None
    empty: frozenset[str]
    """Parameters whose state has no keys yet."""
    values: dict[str, dict[str, Any]]
    """Parameter -> key -> value as JSON, for values that are not tensors."""
    of_all: dict[str, Any]
    """State that belongs to no parameter, as JSON."""
    inner_tensors: frozenset[str]
    """Names of the tensors inside such values."""
    same: dict[str, str]
    """Name of a shared tensor -> name that it is stored under."""
    parameters: dict[str, list[bool]]
    """Tensor name -> whether it was an ``nn.Parameter``, and whether it required gradients."""

    @classmethod
    def read(
        cls, table: Any, objects: Mapping[str, Any], *, prefix: str, names: Collection[str], where: str
    ) -> StoredOptimizer:
        """Parse the JSON. ``names``: all parameters of the program. Raises DamagedCheckpointError."""
        values: dict[str, dict[str, Any]] = {}
        of_all: dict[str, Any] = {}
        inner: set[str] = set()
        try:
            for full, value in objects.items():
                if full.startswith(f"{prefix}global."):
                    of_all[full.removeprefix(f"{prefix}global.")] = value
                elif full.startswith(f"{prefix}state."):
                    name, key = split_name(full.removeprefix(f"{prefix}state."), names)
                    values.setdefault(name, {})[key] = value
                else:
                    continue
                inner |= tensor_names(value)
            groups = [
                {**group, "params": [str(name) for name in group["params"]]} for group in table["groups"]
            ]
            kind = str(table["class"]) if "class" in table else None
            on_host = frozenset(table["on_host"]) if "on_host" in table else None
            empty = frozenset(table.get("empty", ()))
            same, parameters = dict(table.get("same", {})), dict(table.get("parameters", {}))
        except MALFORMED as error:
            raise DamagedCheckpointError(
                f"{where} is damaged: train_state.json has invalid content for {prefix.rstrip('.')} "
                f"({error!r})"
            ) from None
        return cls(kind, groups, on_host, empty, values, of_all, frozenset(inner), same, parameters)

    def tensor_keys(self, base: str, reader: StoredStep) -> list[str]:
        """Return the keys of a parameter's state, with the prefix ``base``, that are tensors."""
        found = [key for key in reader.index.under(base) if base + key not in self.inner_tensors]
        return found + [name.removeprefix(base) for name in self.same if name.startswith(base)]


def split_name(rest: str, names: Collection[str]) -> tuple[str, str]:
    """Split ``<parameter>.<key>`` after the longest known parameter, or, without one, at the last dot."""
    end = len(rest)
    while (end := rest.rfind(".", 0, end)) > 0:
        if rest[:end] in names:
            return rest[:end], rest[end + 1 :]
    name, _, key = rest.rpartition(".")
    return name, key


def kind_of(optimizer: torch.optim.Optimizer) -> str:
    """Return an optimizer's class name. For a wrapper, return that of the optimizer whose state it shares."""
    for value in vars(optimizer).values():
        if isinstance(value, torch.optim.Optimizer) and value.state is optimizer.state:
            return kind_of(value)
    return type(optimizer).__qualname__


def check_whole(optimizer: torch.optim.Optimizer, given: Collection[torch.optim.Optimizer]) -> None:
    """Raise TypeError if an optimizer has state outside its ``state`` and ``param_groups``.

    ``given``: all optimizers that the user passes.
    """
    kind = type(optimizer).__name__
    for attribute, value in vars(optimizer).items():
        values = value if isinstance(value, (list, tuple)) else (value,)
        for inner in values if not isinstance(value, dict) else value.values():
            is_other = isinstance(inner, torch.optim.Optimizer) and inner.state is not optimizer.state
            if is_other and not any(inner is passed for passed in given):
                raise TypeError(
                    f"{kind}.{attribute} is an optimizer with its own state, {type(inner).__name__}: "
                    "pass both, as a dict of optimizers"
                )
    is_own = type(optimizer).state_dict is not torch.optim.Optimizer.state_dict
    if is_own or optimizer._optimizer_state_dict_post_hooks:
        more = optimizer.state_dict().keys() - {"state", "param_groups"}
        if more:
            raise TypeError(
                f"state_dict() of {kind} has {', '.join(sorted(map(repr, more)))} beside state and "
                "param_groups: pass it as extra=, with optimizer={} (docs/guide/optimizers.md)"
            )


def init_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Create the state that the first step of torch's Adam and AdamW would create: zeros.

    This way the first save of a run needs the same host buffers as later ones. Does nothing if
    state exists already, or for other optimizers, which create their state in the first step.
    """
    if optimizer.state or type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        on_device = bool(group["fused"] or group["capturable"])
        for param in group["params"]:
            zeros = {"exp_avg", "exp_avg_sq"} | ({"max_exp_avg_sq"} if group["amsgrad"] else set())
            optimizer.state[param] = {
                # Fused and captured kernels count on the device; the others read the count on the CPU.
                "step": torch.zeros((), dtype=torch.float32, device=param.device if on_device else "cpu"),
                **{
                    name: torch.zeros_like(param, memory_format=torch.preserve_format)
                    for name in sorted(zeros)
                },
            }


def _reused(here: Any, taken: set[int]) -> torch.Tensor | None:
    """Return the optimizer's existing tensor, unless its memory is shared, with a parameter for example."""
    if not isinstance(here, torch.Tensor) or (memory := memory_of(here)) in taken:
        return None
    taken |= {memory} - {0}
    return here.detach()


def _as_it_was(value: torch.Tensor, here: Any, flags: list[bool] | None) -> torch.Tensor:
    """Return the tensor with its saved flags: the existing object if that was filled."""
    is_parameter, needs_grad = flags or (False, False)
    is_filled = isinstance(here, torch.Tensor) and memory_of(here) == memory_of(value) != 0
    if is_filled and (isinstance(here, nn.Parameter), here.requires_grad) == (is_parameter, needs_grad):
        return here
    if is_parameter:
        return nn.Parameter(value, requires_grad=needs_grad)
    return value.detach().requires_grad_() if needs_grad else value


def _pack(value: Any, name: str, packer: Packer) -> Any:
    """Return a value that is not a tensor of a parameter as JSON.

    Raises TypeError for a DTensor in it, because there is no parameter whose layout it could
    follow.
    """
    encoded = packer.pack(value, name=name)
    for name in tensor_names(encoded):
        if isinstance(packer.tensors[name], DTensor):
            raise TypeError(f"{name} is a DTensor that belongs to no parameter, so it cannot be resharded")
    return encoded


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4]) or "none"
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown
