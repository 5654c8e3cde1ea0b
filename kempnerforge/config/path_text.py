"""Paths in a config, in which ``~`` and environment variables such as ``$SCRATCH`` are expanded."""

from __future__ import annotations

import os
import re
from pathlib import Path

from kempnerforge.errors import ConfigError, ConfigIssue

_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})", re.ASCII)
"""As ``os.path.expandvars`` reads them."""


def expand(text: str, *, key: str) -> Path:
    """Return the path that ``text`` means. Raises ConfigError for a variable that is not set."""
    if faults := unset_variables(text, key=key):
        raise ConfigError(faults)
    return Path(os.path.expandvars(text)).expanduser()


def unset_variables(text: str, *, key: str) -> list[ConfigIssue]:
    """Report the environment variables in ``text``, the value of ``key``, that are not set."""
    names = dict.fromkeys(match[1] or match[2] for match in _VARIABLE.finditer(text))
    return [
        ConfigIssue(key, f'"{text}": ${name} is not set', "set the variable, or write the path out")
        for name in names
        if name not in os.environ
    ]
