"""``[[hooks]]``: code of the user's that runs at fixed points of the training loop."""

from __future__ import annotations

from typing import Any, Literal

from kempnerforge.config.section import Arguments, NonEmpty, Section
from kempnerforge.config.suggestions import nearest
from kempnerforge.errors import ConfigIssue

METHODS = ("on_train_start", "on_step_end", "on_checkpoint_committed", "on_eval_end", "on_train_end")
"""The methods that a hook may have."""


class HookConfig(Section):
    """A hook: code that runs at fixed points of the training."""

    name: NonEmpty
    """A class or a function that returns a hook: package.module:attribute, or a registered name."""

    args: Arguments = {}  # noqa: RUF012 - pydantic copies it
    """Keyword arguments of the hook."""

    on_error: Literal["stop", "warn"] = "stop"
    """What to do when the hook raises an exception. stop: commit a save that is due, then end the run with
    status 1. warn: print a warning and train on."""


def method_issues(hook: Any, key: str) -> list[ConfigIssue]:
    """Return why methods of ``hook``, an object or its class, would never be called."""
    names = [name for name in dir(hook) if name.startswith("on_") and callable(getattr(hook, name))]
    issues = [
        ConfigIssue(key, f"the hook's method {name} would never be called", f"did you mean {close}?")
        for name in names
        if name not in METHODS and (close := nearest(name, list(METHODS)))
    ]
    if not issues and not set(METHODS) & set(names):
        problem = "the hook has no method that would be called"
        issues.append(ConfigIssue(key, problem, f"write any of {', '.join(METHODS)}"))
    return issues
