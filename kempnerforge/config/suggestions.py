"""Suggest known sections and keys for a misspelled name."""

from __future__ import annotations

from difflib import get_close_matches

from pydantic.fields import FieldInfo

from kempnerforge.config.field_docs import is_arguments, nested_section, walk_keys
from kempnerforge.config.section import Section


def nearest(word: str, known: list[str]) -> str | None:
    """Return the known word closest to ``word``, or None if none is close."""
    matches = get_close_matches(word.lower(), known, n=1, cutoff=0.6)
    return matches[0] if matches else None


def suggest_key(key: str, root: type[Section]) -> str:
    """Suggest a replacement for the unknown dotted ``key``: ``did you mean ...?`` or the known names.

    Search for a close name in the same table, or in the table that was probably meant. Then search
    all tables for the same last part, and finally for a close last part.
    """
    table, _, last = key.rpartition(".")
    if not table and (section := nearest(last, list(root.model_fields))):
        return f"did you mean [{section}]?"
    siblings = table_names(table, root)
    meant = table if siblings else nearest(table, list(root.model_fields))
    if table and meant and (name := nearest(last, table_names(meant, root) or [])):
        return f"did you mean {meant}.{name}?"
    names = [entry.name for entry in walk_keys(root)]
    lasts = {name.rpartition(".")[2] for name in names}
    if same := last if last in lasts else nearest(last, sorted(lasts)):
        return f"did you mean {' or '.join(name for name in names if name.endswith(f'.{same}'))}?"
    if table and siblings:
        return f"known in [{table}]: {', '.join(siblings)}"
    return f"sections: {', '.join(root.model_fields)}"


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
