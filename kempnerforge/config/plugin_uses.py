"""The plug-ins that a job names: which key, what kind, and with which arguments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kempnerforge.config.job import JobConfig
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
        return argument_issues(plugin, self.args, key=self.args_key, given=self.num_positional)


def plugin_uses(job: JobConfig) -> Iterator[PluginUse]:
    """Yield the plug-ins of ``job`` that are not KempnerForge's own. Imports none of them."""
    for use in _named(job):
        if not is_built_in(use.kind, use.name):
            yield use


def _named(job: JobConfig) -> Iterator[PluginUse]:
    yield PluginUse("model", "model.name", job.model.name, job.model.args, "model.args")


def plugin_issues(job: JobConfig) -> list[ConfigIssue]:
    """Return the issues of all plug-ins of ``job``. Imports them."""
    return [issue for use in plugin_uses(job) for issue in use.issues()]


def check_plugins(job: JobConfig) -> None:
    """Import all plug-ins of ``job``. Raises ConfigError with every issue."""
    if issues := plugin_issues(job):
        raise ConfigError(issues)


def plugin_versions(job: JobConfig) -> dict[str, str]:
    """Return ``plugin KEY`` of each plug-in -> its version, for the record of a checkpoint.

    Raises ConfigError for one that cannot be imported.
    """
    return {f"plugin {use.key}": use.resolve().version for use in plugin_uses(job)}


def plugin_identities(job: JobConfig) -> dict[str, str]:
    """Return the config key of each plug-in -> what it was resolved to: name, origin, source digest.

    Raises ConfigError for one that cannot be imported.
    """
    return {use.key: use.resolve().identity for use in plugin_uses(job)}
