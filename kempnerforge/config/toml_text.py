"""Render resolved configurations as TOML text and as flat dotted keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import tomli_w

Comment = Callable[[str], str]
"""Dotted key -> the comment after its line."""


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested tables into dotted key -> value."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def render(tree: Mapping[str, Any], comment: Comment | None = None) -> str:
    """Return ``tree`` (section -> key -> value of plain JSON types) as TOML text.

    TOML has no null: keys that are None are omitted, or shown as comments if ``comment`` is given.
    With ``comment``, each line ends with what it returns for the key.
    """
    blocks: list[str] = []
    _render_table(tree, "", comment, blocks)
    return "\n".join(blocks)


def _render_table(tree: Mapping[str, Any], table: str, comment: Comment | None, blocks: list[str]) -> None:
    lines: list[tuple[str, str]] = []
    for name, value in tree.items():
        if isinstance(value, dict) or _is_list_of_tables(value):
            continue
        key = f"{table}.{name}" if table else name
        if value is not None:
            lines.append((f"{_name(name)} = {value_text(value)}", key))
        elif comment:
            lines.append((f'# {name} = "none"', key))
    if lines:
        blocks.append(f"[{table}]\n{_aligned(lines, comment)}" if table else _aligned(lines, comment))
    for name, value in tree.items():
        key = f"{table}.{name}" if table else name
        if isinstance(value, dict):
            _render_table(value, key, comment, blocks)
        elif _is_list_of_tables(value):
            for item in value:
                given = [
                    (f"{_name(inner)} = {value_text(x)}", key)
                    for inner, x in item.items()
                    if x not in (None, {})
                ]
                blocks.append(f"[[{key}]]\n{_aligned(given, comment)}")


def _is_list_of_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _aligned(lines: list[tuple[str, str]], comment: Comment | None) -> str:
    if comment is None:
        return "".join(f"{text}\n" for text, _ in lines)
    # Ignore long values: one of them would push all comments to the right.
    width = max((len(text) for text, _ in lines if len(text) <= 48), default=0)
    return "".join(f"{text:<{width}}  # {comment(key)}\n" for text, key in lines)


def value_text(value: Any) -> str:
    """Return a value as TOML on one line. tomli_w would spread lists and tables over several."""
    if isinstance(value, list):
        return f"[{', '.join(value_text(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_name(name)} = {value_text(item)}" for name, item in value.items()) + "}"
    return tomli_w.dumps({"x": value}).removeprefix("x = ").rstrip("\n")


def _name(name: str) -> str:
    """Return a key as TOML, in quotes where it needs them."""
    return tomli_w.dumps({name: 0}).removesuffix(" = 0\n")
