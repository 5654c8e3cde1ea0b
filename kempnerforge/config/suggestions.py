"""Suggest known sections and keys for a misspelled name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from pydantic.fields import FieldInfo

from kempnerforge.config.field_docs import is_arguments, nested_section, walk_keys
from kempnerforge.config.foreign_keys import KEYS, what_to_write
from kempnerforge.config.section import Section
from kempnerforge.errors import ConfigIssue

CLOSE = 0.75
"""Least similarity of two names of keys. ``type`` and ``tp`` have 0.67, and other meanings."""
MISSPELLED = 0.85
"""The same for names in different tables, which are the same word only if hardly a letter differs."""
_MIN_WORD = 5
"""A part of a name that is shorter must be equal. ``type`` is not a misspelled ``dtype``."""


def nearest(word: str, known: Sequence[str], *, cutoff: float = 0.6) -> str | None:
    """Return the known word closest to ``word``, or None if none is close."""
    matches = get_close_matches(word.lower(), known, n=1, cutoff=cutoff)
    return matches[0] if matches else None


def suggest_key(key: str, root: type[Section]) -> str:
    """Suggest a replacement for the unknown dotted ``key``: ``did you mean ...?`` or the known names.

    A key of another training program has a known replacement. Otherwise, search the table of the
    key, or the one that was probably meant. A key of another table is suggested only if it alone
    has that name: ``train.lr`` is ``optimizer.lr``, but ``train.name`` may be anything.
    """
    if instead := what_to_write(key):
        return instead
    table, _, last = key.rpartition(".")
    sections = list(root.model_fields)
    if not table and (section := _nearest_section(last, sections)):
        return f"did you mean [{section}]?"
    siblings = table_names(table, root)
    meant = table if siblings else _nearest_section(table, sections)
    if table and meant and (names := _near_in_table(last, table_names(meant, root) or [])):
        return f"did you mean {' or '.join(f'{meant}.{name}' for name in names)}?"
    others = [name for name in (entry.name for entry in walk_keys(root)) if re.fullmatch(r"\w+\.\w+", name)]
    lasts = [name.rpartition(".")[2] for name in others]
    same = last if last in lasts else nearest(last, lasts, cutoff=MISSPELLED)
    if same and lasts.count(same) == 1:
        return f"did you mean {others[lasts.index(same)]}?"
    if table and siblings:
        return f"known in [{table}]: {', '.join(siblings)}"
    return f"sections: {', '.join(sections)}"


def _nearest_section(word: str, sections: Sequence[str]) -> str | None:
    """Return the section that ``word`` misspells or abbreviates, such as ``optim``."""
    abbreviated = [name for name in sections if len(word) >= _MIN_WORD and name.startswith(word.lower())]
    return abbreviated[0] if abbreviated else nearest(word, sections, cutoff=CLOSE)


def _near_in_table(word: str, names: Sequence[str]) -> list[str]:
    """Return the name closest to ``word``, or up to three that share a part with it, such as ``clip``."""
    if name := nearest(word, names, cutoff=CLOSE):
        return [name]
    parts = [part for part in word.lower().split("_") if len(part) >= 4]
    sharing = [name for name in names if any(_has_part(name, part) for part in parts)]
    return sharing if len(sharing) <= 3 else []


def _has_part(name: str, part: str) -> bool:
    """Return whether ``part`` is a word of ``name``, or misspells one by a letter."""
    words = name.split("_")
    similar = [word for word in words if len(part) >= _MIN_WORD and abs(len(word) - len(part)) <= 1]
    return part in words or nearest(part, similar, cutoff=CLOSE) is not None


def unknown_section_issues(name: str, table: object, root: type[Section]) -> list[ConfigIssue]:
    """Return one issue for an unknown section, or one for each of its keys if other programs have them."""
    keys = [f"{name}.{key}" for key in table] if isinstance(table, Mapping) else []
    if any(key in KEYS for key in keys):
        return [ConfigIssue(key, "is not a known key", suggest_key(key, root)) for key in keys]
    return [ConfigIssue(name, "is not a known section", suggest_key(name, root))]


def table_names(table: str, root: type[Section]) -> list[str] | None:
    """Return the names in the dotted ``table`` ("" is the top level); None if there is no such table."""
    if not table:
        return list(root.model_fields)
    field = find_field(table, root)
    section = nested_section(field) if field else None
    return list(section.model_fields) if section else None


def find_field(key: str, root: type[Section]) -> FieldInfo | None:
    """Return the field of the dotted ``key``, which may name a table; None if there is no such key.

    A key within a plug-in's arguments gives the field of the arguments.
    """
    table, _, last = key.rpartition(".")
    section = root
    for part in table.split(".") if table else []:
        field = section.model_fields.get(part)
        if field is not None and is_arguments(field):
            return field
        nested = nested_section(field) if field else None
        if nested is None:
            return None
        section = nested
    return section.model_fields.get(last)
