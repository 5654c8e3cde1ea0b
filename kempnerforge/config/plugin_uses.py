"""The plug-ins that a job names: which key, what kind, and with which arguments."""

from __future__ import annotations

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
        issues = argument_issues(plugin, self.args, key=self.args_key, given=self.num_positional)
        if self.kind == "hook" and isinstance(plugin.target, type):
            issues += method_issues(plugin.target, self.key)
        return issues


def plugin_uses(job: JobConfig) -> Iterator[PluginUse]:
    """Yield the plug-ins of ``job`` that are not KempnerForge's own. Imports none of them."""
    return (use for use in _named(job) if not is_built_in(use.kind, use.name))


def _named(job: JobConfig) -> Iterator[PluginUse]:
    yield PluginUse("model", "model.name", job.model.name, job.model.args, "model.args")
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
    return [issue for use in [*plugin_uses(job), *own_sinks] for issue in use.issues()]


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
