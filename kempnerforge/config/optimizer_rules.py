"""Rules of ``[optimizer]`` and ``[scheduler]`` that need more than one key."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from kempnerforge.config.model import ModelConfig
from kempnerforge.config.optimizer import HYPERPARAMETERS, OptimizerConfig, OptimizerGroupConfig
from kempnerforge.config.scheduler import BUILT_IN, SchedulerConfig
from kempnerforge.config.suggestions import nearest
from kempnerforge.errors import ConfigIssue
from kempnerforge.plugins import name_issues

SHOWN = 3
"""Number of names that an error lists."""


def optimizer_is_known(optimizer: OptimizerConfig) -> list[ConfigIssue]:
    """Require the name of an optimizer, or an import path. Nothing is imported."""
    return name_issues("optimizer", optimizer.name, key="optimizer.name")


def scheduler_is_known(scheduler: SchedulerConfig) -> list[ConfigIssue]:
    """Require the name of a schedule, or an import path. Nothing is imported."""
    return name_issues("scheduler", scheduler.name, key="scheduler.name", also=BUILT_IN)


def optimizer_args_are_no_keys(optimizer: OptimizerConfig) -> list[ConfigIssue]:
    """Require keys of ``[optimizer]`` and of groups to be written there, not in ``args``."""
    tables = [("optimizer", optimizer.args)]
    tables += [(f"optimizer.groups[{i}]", group.args) for i, group in enumerate(optimizer.groups)]
    keys = ("lr", *HYPERPARAMETERS)
    return [
        ConfigIssue(f"{where}.args.{key}", f"{key} is a key of its own", f"write {where}.{key}")
        for where, args in tables
        for key in args
        if key in keys
    ]


def optimizer_groups_are_valid(optimizer: OptimizerConfig) -> list[ConfigIssue]:
    """Require regular expressions that can be parsed, and one of ``lr`` and ``lr_scale``."""
    faults = []
    for index, group in enumerate(optimizer.groups):
        where = f"optimizer.groups[{index}]"
        try:
            re.compile(group.match)
        except re.error as error:
            faults.append(_not_an_expression(f"{where}.match", group.match, error))
        if group.lr is not None and group.lr_scale is not None:
            faults.append(
                ConfigIssue(f"{where}.lr_scale", "lr and lr_scale are both set", "leave one of them out")
            )
    return faults


def optimizer_groups_match(model: ModelConfig, optimizer: OptimizerConfig) -> list[ConfigIssue]:
    """Require a parameter for each group. The names of a model of the user's are known once it is built."""
    if not model.is_llama or optimizer_groups_are_valid(optimizer):
        return []
    if freeze_issues(model.freeze, None):
        return []
    names = llama_names(model)
    trained = [name for name in names if not model.freezes(name)]
    return unmatched_groups(optimizer.groups, trained, filter(model.freezes, names))


def model_freeze_matches(model: ModelConfig) -> list[ConfigIssue]:
    """Require valid expressions. For "llama", each matches a parameter, and one is left to train."""
    issues = freeze_issues(model.freeze, llama_names(model) if model.is_llama else None)
    if not issues and model.is_llama and all(map(model.freezes, llama_names(model))):
        issues = [ConfigIssue("model.freeze", "matches every parameter", "leave one to train")]
    return issues


def freeze_issues(expressions: Sequence[str], names: Iterable[str] | None) -> list[ConfigIssue]:
    """Return an issue for each invalid expression, and for each that matches none of ``names``, if known."""
    known = list(names or ())
    faults = []
    for index, expression in enumerate(expressions):
        key = f"model.freeze[{index}]"
        try:
            pattern = re.compile(expression)
        except re.error as error:
            faults.append(_not_an_expression(key, expression, error))
            continue
        if names is not None and not any(map(pattern.search, known)):
            faults.append(_no_match(key, expression, known))
    return faults


def _not_an_expression(key: str, expression: str, error: re.error) -> ConfigIssue:
    problem = f'"{expression}" is not a regular expression: {error}'
    return ConfigIssue(key, problem, "write . as \\\\. to match a dot")


def _no_match(key: str, expression: str, names: Sequence[str]) -> ConfigIssue:
    close = nearest(expression, names)
    hint = f"did you mean {close}?" if close else f"parameters are {', '.join(names[:SHOWN])}, ..."
    return ConfigIssue(key, f'"{expression}" matches no parameter', hint)


def unmatched_groups(
    groups: Sequence[OptimizerGroupConfig], names: Iterable[str], frozen: Iterable[str] = ()
) -> list[ConfigIssue]:
    """Return an issue for each group that is the first match of no name. ``frozen`` names are in no group."""
    names, frozen = list(names), list(frozen)
    first = [group_of(name, groups) for name in names]
    faults = []
    for index, group in enumerate(groups):
        if index in first:
            continue
        key = f"optimizer.groups[{index}].match"
        taken = [name for name in names if re.search(group.match, name)]
        still = [name for name in frozen if re.search(group.match, name)]
        if taken:
            problem = f'"{group.match}" matches only parameters of earlier groups, such as {taken[0]}'
            hint = "the first group that matches is used: put this one before"
            faults.append(ConfigIssue(key, problem, hint))
        elif still:
            problem = f'"{group.match}" matches only frozen parameters, such as {still[0]}'
            faults.append(ConfigIssue(key, problem, "leave the group out, or change model.freeze"))
        else:
            faults.append(_no_match(key, group.match, names))
    return faults


def group_of(name: str, groups: Sequence[OptimizerGroupConfig]) -> int | None:
    """Return the index of the first group whose expression is found in ``name``."""
    return next((i for i, group in enumerate(groups) if re.search(group.match, name)), None)


def llama_names(model: ModelConfig) -> list[str]:
    """Return the names of the parameters of "llama"."""
    layers = [f"layers.{i}.{name}" for i in range(model.n_layers) for name in model.layer_shapes]
    output = [] if model.tie_embeddings else ["output.weight"]
    return ["tok_embeddings.weight", *layers, "norm.weight", *output]


def scheduler_keys_apply(scheduler: SchedulerConfig) -> list[ConfigIssue]:
    """Require the keys of KempnerForge's schedules for these alone, and ``args`` for others alone."""
    if scheduler.is_built_in:
        if not scheduler.args:
            return []
        problem = f'are for a schedule of your own, and scheduler.name is "{scheduler.name}"'
        return [ConfigIssue("scheduler.args", problem, "leave them out")]
    default = SchedulerConfig()
    return [
        ConfigIssue(
            f"scheduler.{key}",
            f'has no effect: "{scheduler.name}" alone decides the schedule',
            f"write scheduler.args.{key}, if it takes it",
        )
        for key in ("warmup_steps", "decay_steps", "min_lr_ratio")
        if getattr(scheduler, key) != getattr(default, key)
    ]


RULES: tuple[Callable[..., list[ConfigIssue]], ...] = (
    optimizer_is_known,
    scheduler_is_known,
    optimizer_args_are_no_keys,
    optimizer_groups_are_valid,
    model_freeze_matches,
    optimizer_groups_match,
    scheduler_keys_apply,
)
