"""Build the model of a config: KempnerForge's own, or any ``nn.Module`` of the user's.

A model is built with its parameters on the meta device, so that it can be sharded before anything is
allocated, and with its buffers on the CPU: their values come from the constructor, which no
checkpoint has if they are not persistent. Random numbers of a constructor are those of the seed.

A model of the user's is a callable that returns an ``nn.Module`` with
``forward(tokens [B, T]) -> logits [B, T, V]``. ``docs/guide/own-model.md`` lists the optional methods.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import deterministic as _deterministic

from kempnerforge.config.model import COMMON_KEYS
from kempnerforge.config.optimizer_rules import freeze_issues
from kempnerforge.config.schema import ModelConfig
from kempnerforge.errors import ConfigError, ConfigIssue
from kempnerforge.plugins import resolve

deterministic: Any = _deterministic  # sets its attributes in a way that type checkers do not see


@dataclass(frozen=True)
class BuiltModel:
    """A whole model whose tensors are not allocated."""

    module: nn.Module
    """The model, with all parameters and buffers on the meta device."""
    buffers: Mapping[str, Tensor]
    """The values of all buffers after the constructor, on the CPU, by name."""

    @property
    def num_parameters(self) -> int:
        """Number of elements of all parameters; a shared one is counted once."""
        return sum(param.numel() for param in self.module.parameters())


def build_meta(config: ModelConfig, *, seed: int) -> BuiltModel:
    """Build the model of ``config`` without allocating its parameters.

    Parameters that ``model.freeze`` matches require no gradient. Does not use the random state of
    the process. Raises ConfigError if a model of the user's cannot be built, or has parameters that
    are not fp32; if an expression of ``freeze`` matches no parameter, or no parameter is left to
    train.
    """
    with _random_numbers_of(seed), _parameters_on_meta():
        module = _construct(config)
    _check_parameters(config, module)
    _freeze(config, module)
    buffers = dict(module.named_buffers(remove_duplicate=False))
    module.to("meta")
    return BuiltModel(module, buffers)


def build_whole(config: ModelConfig, *, seed: int) -> nn.Module:
    """Build the model of ``config`` on the CPU, with its initial weights.

    They are those of the constructor. Modules whose parameters it leaves uninitialized get
    ``reset_parameters()``, and a model with ``init_weights()`` gets that in the end. All draw from the
    global CPU generator, seeded with ``seed``. Restores the random state of the process.

    Raises ConfigError if a parameter is still uninitialized.
    """
    with _random_numbers_of(seed), _uninitialized_is_nan(), torch.no_grad():
        module = _construct(config)
        for inner in module.modules():
            if _is_uninitialized(inner) and callable(reset := getattr(inner, "reset_parameters", None)):
                reset()
    if callable(init_weights := getattr(module, "init_weights", None)):
        with _random_numbers_of(seed), torch.no_grad():
            init_weights()
    if left := [name for name, param in module.named_parameters() if param.isnan().any()]:
        problem = f"{config.name} leaves {', '.join(left[:4])} uninitialized"
        raise _fault(
            "model.name", problem, "set them in the constructor, reset_parameters() or init_weights()"
        )
    return module


def _is_uninitialized(module: nn.Module) -> bool:
    return any(bool(param.isnan().any()) for param in module.parameters(recurse=False))


@contextmanager
def _uninitialized_is_nan() -> Iterator[None]:
    """Fill memory that ``torch.empty`` returns with NaN."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
        deterministic.fill_uninitialized_memory = fills


def _construct(config: ModelConfig) -> nn.Module:
    plugin = resolve("model", config.name, key="model.name")
    if config.is_llama:
        # By name, because a Section's own dump leaves out what another model would not have.
        return plugin.target(
            **{key: getattr(config, key) for key in config.model_fields_set.difference(COMMON_KEYS)}
        )
    with naming_errors(f"{config.name}(...)", key="model.args"):
        module = plugin.target(**config.args)
    if not isinstance(module, nn.Module):
        problem = f"{config.name} returned a {type(module).__name__}"
        raise _fault("model.name", problem, "a model is a torch.nn.Module")
    return module


@contextmanager
def naming_errors(what: str, *, key: str = "model.name") -> Iterator[None]:
    """Raise ConfigError, with ``what`` and the line in a file, for any exception of the user's code."""
    try:
        yield
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        problem = f"{what} raised {type(error).__name__}: {error}"
        raise _fault(key, problem, f"see {frame.filename}:{frame.lineno}") from error


def _check_parameters(config: ModelConfig, module: nn.Module) -> None:
    named = dict(module.named_parameters())
    if not named:
        raise _fault("model.name", f"{config.name} has no parameters", "there is nothing to train")
    for name, param in named.items():
        if isinstance(param, nn.parameter.UninitializedParameter):
            raise _fault(
                "model.name", f"{name} of {config.name} is lazy", "give its shape in the constructor"
            )
        if param.dtype != torch.float32:
            problem = f"{name} of {config.name} is {str(param.dtype).removeprefix('torch.')}"
            raise _fault(
                "model.args", problem, "build it in float32; train.mixed_precision sets the computation"
            )


def _freeze(config: ModelConfig, module: nn.Module) -> None:
    named = dict(module.named_parameters())
    if issues := freeze_issues(config.freeze, named):
        raise ConfigError(issues)
    for name, param in named.items():
        if config.freezes(name):
            param.requires_grad_(False)
    if not any(param.requires_grad for param in named.values()):
        raise _fault(
            "model.name", f"no parameter of {config.name} requires a gradient", "there is nothing to train"
        )


def copy_requires_grad(source: Mapping[str, bool], module: nn.Module) -> None:
    """Set ``requires_grad`` of all parameters of ``module``, which other code may have made anew."""
    for name, param in module.named_parameters():
        param.requires_grad_(source[name])


@contextmanager
def _random_numbers_of(seed: int) -> Iterator[None]:
    """Draw from a CPU generator that is seeded with ``seed``, and restore the random state afterwards."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also seed the generators of other devices.
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move each parameter to the meta device when a module registers it. Buffers remain where they are."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, None if param is None else _on_meta(param))

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _on_meta(param: nn.Parameter) -> nn.Parameter:
    """Return the parameter on the meta device, the same one for the same ``param``, so that ties remain."""
    if param.is_meta or isinstance(param, nn.parameter.UninitializedParameter):
        return param
    twin: nn.Parameter | None = getattr(param, "_kempnerforge_meta", None)
    if twin is None:
        twin = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        param._kempnerforge_meta = twin  # type: ignore[attr-defined]
    return twin


def _fault(key: str, problem: str, hint: str) -> ConfigError:
    return ConfigError([ConfigIssue(key, problem, hint)])


def computes_loss(module: nn.Module) -> bool:
    """Return whether the model has a method ``loss(batch)``, which is then used instead of ``forward``.

    A loss function or module that is an attribute of the model is no method.
    """
    return callable(getattr(type(module), "loss", None))


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """Return the modules that are sharded, recomputed and compiled one by one.

    They are those of ``module.fsdp_units()`` if it exists, else the members of the outermost lists,
    dicts and sequences with at least two modules of one class that have parameters.

    Raises ConfigError if ``fsdp_units()`` raises an exception, or returns anything but submodules.
    """
    units = getattr(module, "fsdp_units", None)
    if callable(units):
        with naming_errors(f"fsdp_units() of {type(module).__name__}"):
            found: Any = list(units())  # type: ignore[call-overload]
        inside = set(module.modules())
        for unit in found:
            if not isinstance(unit, nn.Module) or unit not in inside or unit is module:
                problem = f"fsdp_units() returned {type(unit).__name__}, which is no submodule"
                raise _fault("model.name", problem, "return modules that the model contains")
        return found
    return list(_blocks_below(module))


def _blocks_below(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        is_list = isinstance(child, nn.ModuleList | nn.ModuleDict | nn.Sequential)
        members = list(child.children()) if is_list else []
        is_repeated = len(members) > 1 and len({type(member) for member in members}) == 1
        if is_repeated and next(members[0].parameters(), None) is not None:
            yield from members
        else:
            yield from _blocks_below(child)
