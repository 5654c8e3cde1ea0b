"""The plug-ins that a job names: which key, what kind, and with which arguments."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kempnerforge.config.hooks import HookConfig, method_issues
from kempnerforge.config.job import JobConfig
from kempnerforge.config.metrics import SinkConfig
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
    args_key: str
    """The config key of the arguments, such as ``model.args``."""
    num_positional: int = 0
    """Number of positional arguments that KempnerForge passes before ``args``."""

    def resolve(self) -> Plugin:
        """Import the plug-in. Raises ConfigError."""
        return resolve(self.kind, self.name, key=self.key)

    def issues(self) -> list[ConfigIssue]:
        """Return why the plug-in cannot be imported and called with its arguments."""
        try:
            plugin = self.resolve()
        except ConfigError as error:
            return list(error.faults)
        # A loss of hidden states also gets the weight of the output layer.
        given = self.num_positional + bool(getattr(plugin.target, "takes_hidden", False))
        issues = argument_issues(plugin, self.args, key=self.args_key, given=given)
        if self.kind == "hook" and isinstance(plugin.target, type):
            issues += method_issues(plugin.target, self.key)
        return issues


def plugin_uses(job: JobConfig) -> Iterator[PluginUse]:
    """Yield the plug-ins of ``job`` that are not KempnerForge's own. Imports none of them."""
    return (use for use in _named(job) if not is_built_in(use.kind, use.name))


def _named(job: JobConfig) -> Iterator[PluginUse]:
    yield PluginUse("model", "model.name", job.model.name, job.model.args, "model.args")
    yield PluginUse("loss", "train.loss", job.train.loss, job.train.loss_args, "train.loss_args", 2)
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


def plugin_issues(job: JobConfig) -> list[ConfigIssue]:
    """Return the issues of all plug-ins of ``job``, and of KempnerForge's own sinks. Imports them."""
    own_sinks = [use for use in sink_uses(job) if is_built_in(use.kind, use.name)]
    issues = [issue for use in [*plugin_uses(job), *own_sinks] for issue in use.issues()]
    return issues or _loss_issues(job)


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
