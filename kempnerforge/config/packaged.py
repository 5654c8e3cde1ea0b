"""The configurations that come with the package: those of ``configs/``."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

from kempnerforge.config.sources import merge_layers, read_layers
from kempnerforge.config.toml_text import render
from kempnerforge.errors import ConfigError, ConfigIssue

FOLDER = Path(__file__).parent / "examples"
_SCHEMA_LINE = "#:schema ./schema.json\n"


def packaged_names() -> list[str]:
    """Return the names of all packaged configurations."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def packaged_config(name: str) -> str:
    """Return the text of a packaged configuration.

    It stands alone: it names no schema file, and one that extends others contains their values.
    Raises ConfigError for an unknown name.
    """
    if name not in packaged_names():
        allowed = f"choose one of {', '.join(packaged_names())}"
        raise ConfigError([ConfigIssue("NAME", f'there is no config "{name}"', allowed)], where="config new")
    path = FOLDER / f"{name}.toml"
    text = path.read_text(encoding="utf-8").removeprefix(_SCHEMA_LINE)
    layers = read_layers(path)
    if len(layers) == 1:
        return text
    comment = takewhile(lambda line: line.startswith("#"), text.splitlines(keepends=True))
    return f"{''.join(comment)}\n{render(merge_layers(layers))}"
