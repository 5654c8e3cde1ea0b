"""Descriptions of config keys, their types and defaults, for ``--help`` and error messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from kempnerforge.config.section import Section

PLAIN_TYPES = {int: "integer", float: "number", bool: "true or false", str: "text", NoneType: "none"}


@dataclass(frozen=True)
class Key:
    """One config key."""

    name: str
    """Dotted name relative to the section that was walked, such as ``train.batch_size``."""
    field: FieldInfo

    @property
    def allowed(self) -> str:
        """Type and bounds in words, such as ``integer >= 1 or none``."""
        return type_in_words(self.field.annotation, self.field.metadata)

    @property
    def default(self) -> str:
        """Default as written in TOML, ``none``, or ``required``."""
        if self.field.is_required():
            return "required"
        return value_in_words(self.field.get_default(call_default_factory=True))

    @property
    def doc(self) -> str:
        """Documentation of the key, on one line."""
        return " ".join((self.field.description or "").split())


def walk_keys(section: type[Section], prefix: str = "") -> Iterator[Key]:
    """Yield all keys of ``section`` that hold a value, in order, with optional tables and their keys.

    The keys of each table of a list ``x`` are named ``x[].key``.
    """
    for name, field in section.model_fields.items():
        nested, item = nested_section(field), item_section(field)
        if nested is None or is_optional(field):
            yield Key(prefix + name, field)
        if nested is not None:
            yield from walk_keys(nested, f"{prefix}{name}.")
        if item is not None:
            yield from walk_keys(item, f"{prefix}{name}[].")


def nested_section(field: FieldInfo) -> type[Section] | None:
    """Return the section that ``field`` holds, optional or not; None if it holds a plain value."""
    for option in _options(field.annotation):
        if isinstance(option, type) and issubclass(option, Section):
            return option
    return None


def item_section(field: FieldInfo) -> type[Section] | None:
    """Return the section of each item of a list of tables; None if ``field`` is no such list."""
    for option in _options(field.annotation):
        if get_origin(option) is list:
            item = get_args(option)[0]
            if isinstance(item, type) and issubclass(item, Section):
                return item
    return None


def is_arguments(field: FieldInfo) -> bool:
    """Return whether ``field`` is a table whose keys are the arguments of a plug-in."""
    return any(get_origin(option) is dict for option in _options(field.annotation))


def is_optional(field: FieldInfo) -> bool:
    """Return whether ``field`` may be None."""
    return NoneType in _options(field.annotation)


def takes_text(field: FieldInfo) -> bool:
    """Return whether ``field`` accepts any string, not only listed ones."""
    return any(_without_bounds(option)[0] is str for option in _options(field.annotation))


def known_values(field: FieldInfo) -> list[str]:
    """Return the strings that a literal or enum field accepts, also as items of a list."""
    values: list[str] = []
    for option in _options(field.annotation):
        inner = _without_bounds(option)[0]
        for kind in (inner, *(member for arg in get_args(inner) for member in _options(arg))):
            values += [value for value in _listed_values(kind) if isinstance(value, str)]
    return values


def type_in_words(annotation: Any, metadata: list[Any]) -> str:
    """Return type and bounds as readable text: ``integer >= 1``, ``"a" | "b"``, ``list of text``."""
    kind, inner_metadata = _without_bounds(annotation)
    bounds = _Bounds([*metadata, *inner_metadata])
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(type_in_words(option, []) for option in get_args(kind))
    if listed := _listed_values(kind):
        return " | ".join(value_in_words(value) for value in listed)
    if get_origin(kind) is list:
        return f"list of {type_in_words(get_args(kind)[0], [])}"
    if get_origin(kind) is tuple:
        return f"[{', '.join(type_in_words(item, []) for item in get_args(kind))}]"
    if get_origin(kind) is dict:
        values = get_args(kind)[1]
        is_plain = get_origin(values) is Annotated
        return f"table of names, each with {type_in_words(values, [])}" if is_plain else "table of arguments"
    if isinstance(kind, type) and issubclass(kind, Section):
        return f"table with {', '.join(kind.model_fields)}"
    if bounds.only_value is not None:
        return value_in_words(bounds.only_value)
    return f"{PLAIN_TYPES[kind]}{bounds}"


def value_in_words(value: Any) -> str:
    """Return a value as written in TOML, truncated to 80 characters."""
    if value is None:
        return "none"
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, (str, bool)):
        text = json.dumps(value, ensure_ascii=False)
    elif isinstance(value, (list, tuple)):
        text = f"[{', '.join(value_in_words(item) for item in value)}]"
    elif isinstance(value, dict):
        text = f"{{{', '.join(f'{key} = {value_in_words(item)}' for key, item in value.items())}}}"
    else:
        text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class _Bounds:
    """The limits in a field's metadata, as text."""

    def __init__(self, metadata: list[Any]) -> None:
        self._limits: dict[str, Any] = {}
        for item in metadata:
            for name in ("ge", "gt", "le", "lt", "pattern"):
                if (limit := getattr(item, name, None)) is not None:
                    self._limits[name] = limit

    @property
    def only_value(self) -> Any:
        """The value if the limits allow exactly one, else None."""
        low, high = self._limits.get("ge"), self._limits.get("le")
        return low if low == high else None

    def __str__(self) -> str:
        signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
        parts = [f"{sign} {self._limits[name]}" for name, sign in signs.items() if name in self._limits]
        text = f" {' and '.join(parts)}" if parts else ""
        return f"{text} matching {self._limits['pattern']}" if "pattern" in self._limits else text


def _options(annotation: Any) -> list[Any]:
    """Return the members of a union, or the annotation itself."""
    if get_origin(annotation) in (Union, UnionType):
        return list(get_args(annotation))
    return [annotation]


def _without_bounds(annotation: Any) -> tuple[Any, list[Any]]:
    """Split ``Annotated[X, Field(ge=1)]`` into X and the metadata of its Field."""
    if get_origin(annotation) is not Annotated:
        return annotation, []
    kind, *extras = get_args(annotation)
    return kind, [item for extra in extras if isinstance(extra, FieldInfo) for item in extra.metadata]


def _listed_values(kind: Any) -> list[Any]:
    """Return the values of a ``Literal`` or an ``Enum``; an empty list for other types."""
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [member.value for member in kind]
    return []
