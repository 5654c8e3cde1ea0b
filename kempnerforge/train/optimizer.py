"""Build the optimizers of a config: groups of parameters, and the plug-in that it names."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

import torch
from torch import nn

from kempnerforge.checkpoint.state.optimizer_state import init_optimizer_state
from kempnerforge.config.optimizer_rules import group_of, unmatched_groups
from kempnerforge.config.plugin_uses import optimizer_issues, optimizer_use
from kempnerforge.distributed.consensus import mark_collective
from kempnerforge.errors import ConfigError, ConfigIssue
from kempnerforge.model.build import repeated_blocks

if TYPE_CHECKING:
    from kempnerforge.config.schema import OptimizerConfig

FUSED_DEVICES = ("cpu", "cuda")
HYPERPARAMETERS = (
    *("name", "lr", "betas", "eps", "weight_decay", "fused", "lr_scale"),
    *("amsgrad", "maximize", "foreach", "capturable", "differentiable", "decoupled_weight_decay"),
)
"""Keys of optimizer groups that the config sets, besides the arguments of the optimizer's class. The
checkpoint sets every other key, such as a counter."""
Optimizers = torch.optim.Optimizer | Mapping[str, torch.optim.Optimizer]
"""One optimizer, or several by name."""


class ScheduleFree(Protocol):
    """An optimizer whose weights to evaluate are not those to train."""

    def eval(self) -> None:
        """Turn the parameters into the weights to evaluate."""

    def train(self) -> None:
        """Turn the parameters into the weights to train."""


def is_schedule_free(optimizer: object) -> TypeGuard[ScheduleFree]:
    """Return whether an optimizer, or a class of one, has evaluation weights: ``eval()`` and ``train()``."""
    return all(callable(getattr(optimizer, name, None)) for name in ("eval", "train"))


def each(optimizers: Optimizers) -> Iterator[torch.optim.Optimizer]:
    """Yield the one optimizer, or all of them."""
    yield from (optimizers,) if isinstance(optimizers, torch.optim.Optimizer) else optimizers.values()


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters of the **whole** model that share their hyperparameters."""

    name: str
    names: tuple[str, ...]
    """Names of the parameters, in the model's order."""
    settings: Mapping[str, Any]
    """Keys of the group that differ from the arguments of the optimizer."""


def parameter_groups(parts: Sequence[nn.Module], config: OptimizerConfig) -> list[ParameterGroup]:
    """Return the groups of all parameters of ``parts``, a whole model, that require gradients.

    Matrices have the weight decay of the config. Norms and biases, whose weights need not be small,
    have 0 unless a group sets it. An optimizer that is a function also gets hidden matrices apart
    from other parameters, with ``hidden`` set. Raises ConfigError.
    """
    if faults := optimizer_issues(config):
        raise _refused(*faults)
    target = optimizer_use(config).resolve().target
    named = {name: param for part in parts for name, param in part.named_parameters()}
    parameters = {name: param for name, param in named.items() if param.requires_grad}
    if faults := unmatched_groups(config.groups, parameters, named.keys() - parameters.keys()):
        raise _refused(*faults)
    by_hidden = not inspect.isclass(target)
    hidden = hidden_matrices(parts) if by_hidden else set()
    sorted_names: dict[tuple[int, bool, bool], list[str]] = {}
    if not by_hidden:
        sorted_names = {(-1, False, False): [], (-1, False, True): []}
    for name, param in parameters.items():
        index = group_of(name, config.groups)
        is_hidden = name in hidden
        if index is not None and (forced := config.groups[index].hidden) is not None:
            _check_hidden(index, name, param, by_hidden=by_hidden)
            is_hidden = forced
        key = (-1 if index is None else index, not is_hidden and by_hidden, param.ndim < 2)
        sorted_names.setdefault(key, []).append(name)
    takes_decay = "weight_decay" in _arguments_of(target)
    return [
        _group(config, *key, names=names, by_hidden=by_hidden, takes_decay=takes_decay)
        for key, names in sorted(sorted_names.items(), key=lambda item: item[0])
    ]


def _check_hidden(index: int, name: str, param: torch.Tensor, *, by_hidden: bool) -> None:
    key = f"optimizer.groups[{index}].hidden"
    if not by_hidden:
        hint = "leave it out, or use muon"
        problem = "has no effect: the optimizer updates all parameters alike"
        raise _refused(ConfigIssue(key, problem, hint))
    if param.ndim < 2:
        problem = f"{name} of shape {tuple(param.shape)} is not a matrix"
        raise _refused(ConfigIssue(key, problem, "match matrices only"))


def _group(
    config: OptimizerConfig,
    index: int,
    is_rest: bool,
    is_vector: bool,
    *,
    names: Sequence[str],
    by_hidden: bool,
    takes_decay: bool,
) -> ParameterGroup:
    words = [f"groups[{index}]"] if index >= 0 else []
    settings: dict[str, Any] = {}
    if by_hidden:
        words.append("rest" if is_rest else "hidden")
        settings["hidden"] = not is_rest
    words.append("no_decay" if is_vector else "decay")
    if is_vector and takes_decay:
        settings["weight_decay"] = 0.0
    if index >= 0:
        group = config.groups[index]
        own = {key: getattr(group, key) for key in ("weight_decay", "betas", "eps")}
        settings |= {key: value for key, value in own.items() if value is not None} | group.args
        scale = group.lr_scale or 1.0
        settings["lr_scale"] = group.lr / config.lr if group.lr is not None else scale
        settings["lr"] = config.lr * settings["lr_scale"]
    # Set in every group: the checkpoint's value counts for a key that a group lacks.
    settings.setdefault("lr_scale", 1.0)
    return ParameterGroup(".".join(words), tuple(names), settings)


def hidden_matrices(parts: Sequence[nn.Module]) -> set[str]:
    """Return the names of the weights of linear layers and convolutions, without output layers.

    An output layer has as many outputs as an embedding has rows and is in no repeated block, or
    shares its weight with the embedding. In a model without an embedding it is the last linear layer.
    """
    inside = {module for part in parts for block in repeated_blocks(part) for module in block.modules()}
    modules = [(name, module) for part in parts for name, module in part.named_modules()]
    tables = [module.weight for _, module in modules if isinstance(module, nn.Embedding)]
    linear = [(name, module) for name, module in modules if isinstance(module, nn.Linear)]
    found: dict[str, torch.Tensor] = {}
    for name, module in modules:
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            found[f"{name}.weight"] = module.weight
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            found[f"{name}.in_proj_weight"] = module.in_proj_weight
    rows = {table.size(0) for table in tables}
    outputs = [
        f"{name}.weight" for name, module in linear if module.out_features in rows and module not in inside
    ]
    if not tables and linear:
        outputs = [f"{linear[-1][0]}.weight"]
    tied = [name for name, weight in found.items() if any(weight is table for table in tables)]
    return {*found} - {*outputs, *tied}


def build_optimizer(
    parts: Sequence[nn.Module],
    config: OptimizerConfig,
    device: torch.device,
    groups: Sequence[ParameterGroup] | None = None,
) -> torch.optim.Optimizer | dict[str, torch.optim.Optimizer]:
    """Return the optimizer of the config, or several by name, for the parameters of ``parts``.

    ``groups`` are those of the whole model, if ``parts`` are a rank's part of it. State tensors of
    Adam and AdamW are created here, not in the first step. Raises ConfigError.
    """
    groups = groups if groups is not None else parameter_groups(parts, config)
    target = optimizer_use(config).resolve().target
    parameters = {name: param for part in parts for name, param in part.named_parameters()}
    tables: list[dict[str, Any]] = [
        {
            "name": group.name,
            "params": [parameters[name] for name in group.names if name in parameters],
            **group.settings,
        }
        for group in groups
    ]
    arguments = {k: v for k, v in config.arguments.items() if k != "lr" or "lr" in _arguments_of(target)}
    if "fused" in arguments:
        arguments["fused"] = True if arguments["fused"] and device.type in FUSED_DEVICES else None
    try:
        made = target(tables, **arguments)
    except (TypeError, ValueError) as error:
        problem = f'"{config.name}" raised {type(error).__name__}: {error}'
        raise _refused(ConfigIssue("optimizer.name", problem, "see docs/guide/optimizers.md")) from error
    _check_made(config.name, made)
    for optimizer in each(made):
        init_optimizer_state(optimizer)
        if is_schedule_free(optimizer):
            optimizer.train()
    return made


def _refused(*issues: ConfigIssue) -> Exception:
    """Return the error for issues that all ranks find, from the same model and config."""
    return mark_collective(ConfigError(list(issues)))


def _check_made(name: str, made: object) -> None:
    """Raise ConfigError unless ``made`` is what an optimizer plug-in must return."""
    values = list(made.values()) if isinstance(made, dict) else [made]
    problem = "" if values else f'"{name}" made an empty dict'
    for value in values:
        if not isinstance(value, torch.optim.Optimizer):
            problem = problem or f'"{name}" made a {type(value).__name__}'
        else:
            parameters = list(inspect.signature(value.step).parameters.values())
            needs = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
            problem = problem or (f'"{name}": its step() needs {needs[0]}' if needs else "")
    if problem:
        hint = "an optimizer is a torch.optim.Optimizer whose step() needs no argument, or a dict of them"
        raise _refused(ConfigIssue("optimizer.name", problem, hint))


def hyperparameters_of(optimizers: Optimizers) -> list[str]:
    """Return the keys of groups that the config sets, so that a resume keeps them."""
    known = {*HYPERPARAMETERS}
    for optimizer in each(optimizers):
        known |= _arguments_of(type(optimizer)).keys() - {"params"}
    return sorted({key for opt in each(optimizers) for group in opt.param_groups for key in group} & known)


class _Anything(dict[str, Any]):
    """The parameters of a callable that takes any keyword argument."""

    def __contains__(self, key: object) -> bool:
        return True


def _arguments_of(target: Any) -> dict[str, Any]:
    parameters = inspect.signature(target).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return _Anything(parameters)
    return dict(parameters)
