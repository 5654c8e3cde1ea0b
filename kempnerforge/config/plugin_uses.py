"""The plug-ins that a job names: which key, what kind, and with which arguments."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kempnerforge.config.hooks import HookConfig, method_issues
from kempnerforge.config.job import JobConfig
from kempnerforge.config.metrics import SinkConfig
from kempnerforge.config.optimizer import ADAMW, HYPERPARAMETERS, OptimizerConfig
from kempnerforge.config.scheduler import BUILT_IN as SCHEDULES
from kempnerforge.config.scheduler import lr_at
from kempnerforge.errors import ConfigError, ConfigIssue
from kempnerforge.plugins import Plugin, argument_issues, is_built_in, resolve


@dataclass(frozen=True)
class PluginUse:
    """One name in a config that stands for a callable."""

    kind: str
    """See ``plugins.Plugin.kind``."""
    key: str
    """The config key of the name, such as ``model.name``."""
    name: str
    args: Mapping[str, Any]
    """Keyword arguments."""
    args_key: str
    """The config key of the arguments, such as ``model.args``."""
    num_positional: int = 0
    """Number of positional arguments that KempnerForge passes before ``args``."""
    own_keys: Collection[str] = ()
    """Arguments that are keys of the section itself, such as ``betas`` of ``[optimizer]``."""
    also: Sequence[str] = ()
    """Further names that the key accepts, for suggestions."""

    def resolve(self) -> Plugin:
        """Import the plug-in. Raises ConfigError."""
        return resolve(self.kind, self.name, key=self.key, also=self.also)

    def issues(self) -> list[ConfigIssue]:
        """Return why the plug-in cannot be imported and called with its arguments."""
        try:
            plugin = self.resolve()
        except ConfigError as error:
            return list(error.faults)
        # A loss of hidden states also gets the weight of the output layer.
        given = self.num_positional + bool(getattr(plugin.target, "takes_hidden", False))
        faults = argument_issues(plugin, self.args, key=self.args_key, given=given)
        if self.kind == "hook" and isinstance(plugin.target, type):
            faults += method_issues(plugin.target, self.key)
        section = self.key.partition(".")[0]
        moved = {f"{self.args_key}.{key}": f"{section}.{key}" for key in self.own_keys}
        return [replace(fault, key=moved.get(fault.key, fault.key)) for fault in faults]


def plugin_uses(job: JobConfig) -> Iterator[PluginUse]:
    """Yield the plug-ins of ``job`` that are not KempnerForge's own. Imports none of them."""
    return (use for use in _named(job) if not is_built_in(use.kind, use.name))


def _named(job: JobConfig) -> Iterator[PluginUse]:
    yield PluginUse("model", "model.name", job.model.name, job.model.args, "model.args")
    yield PluginUse("loss", "train.loss", job.train.loss, job.train.loss_args, "train.loss_args", 2)
    yield optimizer_use(job.optimizer)
    if not job.scheduler.is_built_in:
        args = job.scheduler.args
        yield PluginUse(
            "scheduler", "scheduler.name", job.scheduler.name, args, "scheduler.args", 2, also=SCHEDULES
        )
    data = job.data
    if data.dataset is not None:
        yield PluginUse("dataset", "data.dataset", data.dataset, data.args, "data.args")
    if data.val is not None:
        yield PluginUse("dataset", "data.val.dataset", data.val.dataset, data.val.args, "data.val.args")
    yield from sink_uses(job)
    yield from hook_uses(job)


def sink_uses(job: JobConfig) -> list[PluginUse]:
    """Return the sinks of ``job``, in order."""
    return [_item("sink", f"metrics.sinks[{i}]", sink) for i, sink in enumerate(job.metrics.sinks)]


def hook_uses(job: JobConfig) -> list[PluginUse]:
    """Return the hooks of ``job``, in order."""
    return [_item("hook", f"hooks[{i}]", hook) for i, hook in enumerate(job.hooks)]


def _item(kind: str, key: str, item: SinkConfig | HookConfig) -> PluginUse:
    return PluginUse(kind, f"{key}.name", item.name, item.args, f"{key}.args")


def optimizer_use(optimizer: OptimizerConfig) -> PluginUse:
    """Return the use of the optimizer, with all arguments that the config sets."""
    keys = ("lr", *HYPERPARAMETERS)
    return PluginUse(
        "optimizer", "optimizer.name", optimizer.name, optimizer.arguments, "optimizer.args", 1, keys
    )


def optimizer_issues(optimizer: OptimizerConfig) -> list[ConfigIssue]:
    """Return why the optimizer cannot be imported and called with what the config sets. Imports it."""
    use = optimizer_use(optimizer)
    faults = use.issues()
    if optimizer.lr == OptimizerConfig.model_fields["lr"].default:
        faults = [fault for fault in faults if fault.key != "optimizer.lr"]
    if faults:
        return faults
    for index, group in enumerate(optimizer.groups):
        where = f"optimizer.groups[{index}]"
        own = {key: getattr(group, key) for key in HYPERPARAMETERS if getattr(group, key, None) is not None}
        of_group = argument_issues(use.resolve(), {**use.args, **own, **group.args}, key=where, given=1)
        names = {f"{where}.{key}": f"{where}.args.{key}" for key in group.args}
        faults += [replace(fault, key=names.get(fault.key, fault.key)) for fault in of_group]
    return [fault for fault in faults if not fault.key.endswith(".lr")]


def plugin_issues(job: JobConfig) -> list[ConfigIssue]:
    """Return the issues of all plug-ins of ``job``, of KempnerForge's own optimizers and sinks, and
    of its schedule at both ends. Imports them.
    """
    uses = [use for use in plugin_uses(job) if use.kind != "optimizer"]
    uses += [use for use in sink_uses(job) if is_built_in(use.kind, use.name)]
    faults = [issue for use in uses for issue in use.issues()]
    tables = [job.optimizer.args, *(group.args for group in job.optimizer.groups)]
    if job.optimizer.name != ADAMW or any(tables):  # adamw takes every key: no need to import torch
        faults += optimizer_issues(job.optimizer)
    if not faults and not job.scheduler.is_built_in:
        try:
            for step in (0, job.train.max_steps - 1):
                lr_at(step, job.scheduler, base_lr=job.optimizer.lr, max_steps=job.train.max_steps)
        except ConfigError as error:
            faults += error.faults
    return faults or _loss_issues(job)


def _loss_issues(job: JobConfig) -> list[ConfigIssue]:
    """Return why the loss cannot be computed with this model and z-loss."""
    uses = {use.kind: use for use in plugin_uses(job)}
    loss = uses["loss"].resolve() if "loss" in uses else None
    issues = z_loss_issues(loss, job.train.z_loss) if loss is not None else []
    takes_hidden = job.train.chunk_tokens is not None or getattr(loss and loss.target, "takes_hidden", False)
    model = uses["model"].resolve().target if "model" in uses else None
    # What a function returns is checked when the model is built.
    if takes_hidden and isinstance(model, type):
        issues += head_issues(job.train.loss, getattr(model, "forward", None), model.__name__)
    return issues


def head_issues(loss: str, forward: Any, model: str) -> list[ConfigIssue]:
    """Return why a model does not offer its hidden states to a loss that needs them."""
    if "head" in inspect.signature(forward).parameters:
        return []
    problem = f'"{loss}" needs hidden states, but {model}.forward has no argument head'
    return [
        ConfigIssue("train.loss", problem, 'use "cross_entropy", or add the argument: docs/guide/losses.md')
    ]


def z_loss_issues(loss: Plugin, coefficient: float) -> list[ConfigIssue]:
    """Return why a loss of the user's cannot be combined with a z-loss."""
    if not coefficient or not getattr(loss.target, "takes_hidden", False):
        return []
    if "z_loss" in inspect.signature(loss.target).parameters:
        return []
    problem = f"{loss.name} takes hidden states and has no argument z_loss, so there are no logits"
    return [ConfigIssue("train.z_loss", problem, "set it to 0, or add the argument: docs/guide/losses.md")]


def check_plugins(job: JobConfig) -> None:
    """Import all plug-ins of ``job``. Raises ConfigError with every issue."""
    if issues := plugin_issues(job):
        raise ConfigError(issues)


def plugin_versions(job: JobConfig) -> dict[str, str]:
    """Return ``plugin KEY`` of each plug-in -> its version, for the record of a checkpoint.

    Sinks are left out: they cannot change the training.

    Raises ConfigError for one that cannot be imported.
    """
    return {f"plugin {use.key}": use.resolve().version for use in plugin_uses(job) if use.kind != "sink"}


def plugin_identities(job: JobConfig) -> dict[str, str]:
    """Return the config key of each plug-in -> what it was resolved to: name, origin, source digest.

    Raises ConfigError for one that cannot be imported.
    """
    return {use.key: use.resolve().identity for use in plugin_uses(job)}
