"""Convert pydantic's errors to issues with key, value, allowed values and the closest known name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from kempnerforge.config.field_docs import (
    item_section,
    known_values,
    nested_section,
    type_in_words,
    value_in_words,
)
from kempnerforge.config.foreign_keys import VALUES
from kempnerforge.config.section import Section
from kempnerforge.config.suggestions import nearest, suggest_key
from kempnerforge.errors import ConfigIssue

COMPLAINTS = {
    "int_type": "is not an integer",
    "float_type": "is not a number",
    "finite_number": "is not a finite number",
    "bool_type": "is not true or false",
    "string_type": "is not text",
    "list_type": "is not a list",
    "tuple_type": "is not a list",
    "model_type": "is not a table",
    "greater_than": "is too small",
    "greater_than_equal": "is too small",
    "less_than": "is too large",
    "less_than_equal": "is too large",
}
"""Pydantic's error type -> what is wrong with a value. All other types read "is not allowed"."""


def section_faults(
    error: ValidationError, table: str, value: Any, section: type[Section], root: type[Section]
) -> list[ConfigIssue]:
    """Return one issue per key of ``table`` that ``error`` names. ``value`` is the table as given.

    ``table`` is empty for the root.
    """
    grouped: dict[str, list[str]] = {}
    fields: dict[str, FieldInfo | None] = {}
    for item in error.errors(include_url=False, include_context=False, include_input=False):
        parts, field = _resolve(item["loc"], section)
        key = ".".join([table, *parts] if table else parts)
        grouped.setdefault(key, []).append(item["type"])
        fields[key] = field
    return [_fault(key, kinds, fields[key], _at(key, table, value), root) for key, kinds in grouped.items()]


def constructor_faults(error: ValidationError, section: type[Section], values: Any) -> list[ConfigIssue]:
    """Return the issues of ``section(**values)``, with the keys that a config has for them."""
    # Imported here: that module imports this one.
    from kempnerforge.config.job import JobConfig

    tables = {nested: name for name, nested in _tables(JobConfig)}
    root = JobConfig if section in tables else section
    faults = section_faults(error, tables.get(section, ""), values, section, root)
    return [replace(fault, source=section.__name__) for fault in faults]


def _tables(section: type[Section], prefix: str = "") -> Iterator[tuple[str, type[Section]]]:
    """Yield the dotted name and the section of each table in ``section``, also of tables in tables."""
    for name, field in section.model_fields.items():
        if nested := nested_section(field):
            yield prefix + name, nested
            yield from _tables(nested, f"{prefix}{name}.")


def _resolve(location: tuple[int | str, ...], section: type[Section]) -> tuple[list[str], FieldInfo | None]:
    """Return the keys in a pydantic location, without union members, and the last field.

    The only indices are those of tables in a list, as in ``groups[0]``.
    """
    parts: list[str] = []
    field: FieldInfo | None = None
    table: type[Section] | None = section
    for part in location:
        if table is None:
            item = item_section(field) if field else None
            if item is None or not isinstance(part, int):
                break
            parts[-1] += f"[{part}]"
            table = item
            continue
        parts.append(str(part))
        field = table.model_fields.get(str(part))
        table = nested_section(field) if field else None
    return parts, field


def _at(key: str, table: str, value: Any) -> Any:
    """Return the value of ``key`` in the given ``table``; None if it is missing."""
    for part in key.removeprefix(f"{table}." if table else "").split("."):
        name, _, index = part.removesuffix("]").partition("[")
        value = value.get(name) if isinstance(value, dict) else None
        if index:
            value = value[int(index)] if isinstance(value, list) else None
    return value


def _fault(
    key: str, kinds: list[str], field: FieldInfo | None, value: Any, root: type[Section]
) -> ConfigIssue:
    if field is None:
        return ConfigIssue(key, "is not a known key", suggest_key(key, root))
    allowed = f"allowed: {type_in_words(field.annotation, field.metadata)}"
    if kinds == ["missing"] and value is None:
        return ConfigIssue(key, "is missing", allowed)
    complaint = COMPLAINTS.get(kinds[0], "is not allowed") if len(set(kinds)) == 1 else "is not allowed"
    if value in ("", []):
        complaint = "is empty"
    elif isinstance(value, (list, tuple)):
        # The message about one item would be wrong for the list as a whole.
        complaint = "is not allowed"
    return ConfigIssue(key, f"{value_in_words(value)} {complaint}", f"{_hint(value, field)}{allowed}")


def _hint(value: Any, field: FieldInfo) -> str:
    """Return ``did you mean ...? `` if a word is close to an allowed one."""
    known = known_values(field)
    words = [word for word in (value if isinstance(value, list) else [value]) if isinstance(word, str)]
    for word in words:
        close = VALUES[word] if VALUES.get(word) in known else nearest(word, known)
        if word not in known and close:
            return f'did you mean "{close}"? '
    return ""
