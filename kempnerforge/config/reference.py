"""Reference of all config keys: text for ``--help``, and a JSON schema for editors."""

from __future__ import annotations

from textwrap import fill
from typing import Any

from kempnerforge.config.field_docs import item_section, nested_section, walk_keys
from kempnerforge.config.job import JobConfig

WIDTH = 100


def keys_text(prefix: str = "") -> str:
    """Return every key that begins with ``prefix``, with type, default and documentation, by section."""
    blocks = []
    for name, field in JobConfig.model_fields.items():
        section = nested_section(field) or item_section(field)
        assert section is not None
        summary = (section.__doc__ or "").splitlines()[0]
        is_list = item_section(field) is not None
        keys = [
            key
            for key in walk_keys(section, f"{name}[]." if is_list else f"{name}.")
            if key.name.startswith(prefix)
        ]
        if not keys:
            continue
        blocks.append(f"[[{name}]]  {summary}" if is_list else f"[{name}]  {summary}")
        for key in keys:
            default = key.default if key.field.is_required() else f"default {key.default}"
            head = _wrap(f"--{key.name}  ({key.allowed}; {default})", indent=2)
            doc = _wrap(key.doc, indent=6)
            blocks.append(f"{head}\n{doc}")
        blocks[-1] += "\n"
    return "\n".join(blocks).rstrip("\n") + "\n" if blocks else ""


def _wrap(text: str, *, indent: int) -> str:
    return fill(text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * 6, break_on_hyphens=False)


def json_schema() -> dict[str, Any]:
    """Return the JSON schema (2020-12) of a configuration file, for editors that validate TOML."""
    schema = _none_as_written(JobConfig.model_json_schema())
    schema["properties"]["extends"] = {
        "type": "string",
        "description": "A base TOML file, relative to this one. Values in this file override it.",
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _none_as_written(node: Any) -> Any:
    """Replace null by "none". In TOML, a key is unset by omission or with the string "none"."""
    if isinstance(node, list):
        return [_none_as_written(item) for item in node]
    if not isinstance(node, dict):
        return node
    if node == {"type": "null"}:
        return {"const": "none"}
    return {
        name: _none_as_written(value)
        for name, value in node.items()
        if not (name == "default" and value is None)
    }
