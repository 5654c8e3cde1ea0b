"""Check the plug-ins of a job for commands that run before it."""

from __future__ import annotations

from dataclasses import replace

from kempnerforge.config.plugin_uses import plugin_issues
from kempnerforge.config.schema import LoadedJob
from kempnerforge.errors import ConfigError, ConfigIssue


def check_plugins(loaded: LoadedJob, *, where: str) -> list[str]:
    """Import the plug-ins of ``loaded``, and build a model of the user's without allocating it.

    Returns facts about that model. Raises ConfigError for plug-ins that cannot be imported or called
    with their arguments, and for a model that does not fit the job. Torch is imported only for a
    model of the user's.
    """
    faults: list[ConfigIssue] = plugin_issues(loaded.job)
    facts: list[str] = []
    if not faults and not loaded.job.model.is_llama:
        from kempnerforge.train.own_model import check_own_model

        try:
            model = check_own_model(loaded.job)
        except ConfigError as error:
            faults = list(error.faults)
        else:
            facts = [
                f"{model.num_parameters:,} parameters in {loaded.job.model.name}",
                f"{model.num_blocks} blocks are sharded one by one; it has "
                f"{', '.join(model.methods) or 'none of the optional methods'}",
            ]
    if faults:
        raise ConfigError(
            [replace(issue, source=loaded.sources.get(issue.key, "")) for issue in faults],
            where=f"{where}, with the plug-ins that it names (--no-plugins skips them)",
        )
    return facts
