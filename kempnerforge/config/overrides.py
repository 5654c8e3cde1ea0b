"""Command-line overrides: ``--section.key=value`` and ``--section.key value``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import tomli

from kempnerforge.config.field_docs import is_optional, nested_section, takes_text, type_in_words
from kempnerforge.config.section import Section
from kempnerforge.config.sources import Layer
from kempnerforge.config.suggestions import find_field, suggest_key
from kempnerforge.errors import ConfigIssue

COMMAND_LINE = "command line"
_NO_ZERO = re.compile(r"^([+-]?)(\.\d)")


def split_positionals(tokens: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split arguments into those that belong to no override, and the overrides.

    Each override is ``--key=value``, or ``--key`` if it has no value.
    """
    positionals: list[str] = []
    overrides: list[str] = []
    waiting = False
    for token in tokens:
        if token.startswith("--"):
            overrides.append(token)
            waiting = "=" not in token
        elif waiting:
            overrides[-1] += f"={token}"
            waiting = False
        else:
            positionals.append(token)
    return positionals, overrides


def override_layers(tokens: Sequence[str], root: type[Section]) -> tuple[list[Layer], list[ConfigIssue]]:
    """Return one layer per override, in order, and their issues. The last value of a key wins."""
    positionals, overrides = split_positionals(tokens)
    faults = [
        ConfigIssue(token, "is not an override", "write --section.key=value", COMMAND_LINE)
        for token in positionals
    ]
    layers: list[Layer] = []
    for override in overrides:
        key, equals, text = override.removeprefix("--").partition("=")
        field = find_field(key, root)
        if field is None:
            faults.append(ConfigIssue(f"--{key}", "is not a known key", suggest_key(key, root), COMMAND_LINE))
        elif not equals:
            allowed = f"write --{key}=VALUE; allowed: {type_in_words(field.annotation, field.metadata)}"
            faults.append(ConfigIssue(f"--{key}", "has no value", allowed, COMMAND_LINE))
        else:
            layers.append(Layer(COMMAND_LINE, _nest(key, parse_value(text, as_text=takes_text(field)))))
    return layers, faults


def parse_value(text: str, *, as_text: bool) -> Any:
    """Parse ``text`` as a TOML value. Return the text itself if it is not TOML.

    With ``as_text`` (the key accepts any string) only a quoted string or a list is parsed as TOML:
    numbers and dates remain text. A number may begin with its point, as in .001, which TOML forbids.
    """
    if not as_text:
        text = _NO_ZERO.sub(r"\g<1>0\2", text)
    try:
        parsed = tomli.loads(f"value = {text}")
    except ValueError:  # not TOML, or an integer of thousands of digits
        return text
    # A line break in the text could have added other keys.
    if set(parsed) != {"value"}:
        return text
    value = parsed["value"]
    return text if as_text and not isinstance(value, (str, list)) else value


def unset_none(tree: dict[str, Any], section: type[Section]) -> dict[str, Any]:
    """Return ``tree`` with "none" and "null" replaced by None for optional keys. TOML has no null."""
    result = dict(tree)
    for name, field in section.model_fields.items():
        if name not in tree:
            continue
        nested, value = nested_section(field), tree[name]
        if nested is not None and isinstance(value, dict):
            result[name] = unset_none(value, nested)
        elif value in ("none", "null") and is_optional(field):
            result[name] = None
    return result


def _nest(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value
