"""The layers of a configuration: files, each overriding the one it extends, then the command line."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli

from kempnerforge.config.path_text import expand
from kempnerforge.errors import ConfigError, ConfigIssue

Tree = dict[str, Any]

DEFAULT = "default"


@dataclass(frozen=True)
class Layer:
    """Values from one source."""

    source: str
    """The file, or ``command line``."""
    tree: Tree


def read_layers(path: Path) -> list[Layer]:
    """Read the file at ``path`` and all files that it extends. Return the outermost base first.

    Raises:
        ConfigError: a file is missing, unreadable or not TOML, or the files extend each other in a
            cycle.
    """
    layers: list[Layer] = []
    seen: list[str] = []
    asked_by = ""
    while True:
        seen.append(os.path.abspath(path))
        tree = _read_toml(path, asked_by)
        base = tree.pop("extends", None)
        layers.insert(0, Layer(str(path), tree))
        if base is None:
            return layers
        if not isinstance(base, str) or not base:
            raise _file_fault("extends", f"{base!r} is not a path", 'write extends = "base.toml"', path)
        asked_by = str(path)
        path = Path(os.path.normpath(path.parent / expand(base, key="extends")))
        if os.path.abspath(path) in seen:
            circle = " -> ".join(os.path.basename(file) for file in [*seen, path])
            raise _file_fault("extends", f"forms a cycle: {circle}", "remove one of them", asked_by)


def merge_layers(layers: Sequence[Layer]) -> Tree:
    """Merge layers into one tree. Later layers override earlier ones.

    Tables are merged key by key. Lists are replaced as a whole.
    """
    merged: Tree = {}
    for layer in layers:
        merged = _merge(merged, layer.tree)
    return merged


def source_of(key: str, layers: Sequence[Layer]) -> str:
    """Return the source of the value of the dotted ``key``, or of the last layer with that table.

    Items of a list have the source of the list.
    """
    for layer in reversed(layers):
        value: Any = layer.tree
        for part in key.partition("[")[0].split("."):
            if not isinstance(value, dict):
                return layer.source
            if part not in value:
                break
            value = value[part]
        else:
            return layer.source
    return DEFAULT


_TOML_HINTS = {
    "Invalid value": "text needs quotes, and true and false are in lower case",
    "Illegal character '\\n'": "a quotation mark is missing",
    "Expected \"'": "a quotation mark is missing",
    "Cannot overwrite a value": "this key is there twice",
    "Cannot declare": "this table is there twice",
}
"""Beginning of a message of tomli -> what to change."""


_BARE_POINT = re.compile(r"=\s*([+-]?)(\.\d[\d_]*(?:[eE][+-]?\d+)?)")
"""A number such as .001."""


def _read_toml(path: Path, asked_by: str) -> Tree:
    origin = f" (which {asked_by} extends)" if asked_by else ""
    text = ""
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors write a byte-order mark
        return tomli.loads(text)
    except FileNotFoundError:
        problem, hint = "does not exist", _files_near(path.parent)
    except IsADirectoryError:
        problem, hint = "is a folder", _files_near(path)
    except UnicodeDecodeError as error:
        problem, hint = f"is not UTF-8 text: byte {error.start}", "is it a TOML file?"
    except tomli.TOMLDecodeError as error:
        problem, hint = _toml_fault(str(error), text)
    except (OSError, ValueError) as error:
        problem, hint = f"cannot be read: {error.strerror if isinstance(error, OSError) else error}", ""
    if asked_by:
        raise _file_fault("extends", f"{path}{origin} {problem}", hint, asked_by)
    raise _file_fault(str(path), problem, hint, "")


def _toml_fault(message: str, text: str) -> tuple[str, str]:
    """Return the message with the line that it is about, and a hint."""
    hint = next((hint for start, hint in _TOML_HINTS.items() if message.startswith(start)), "")
    if found := re.search(r"\(at line (\d+), column (\d+)\)", message):
        line = text.splitlines()[int(found[1]) - 1].strip()
        if number := _BARE_POINT.search(line):
            hint = f"write {number[1]}0{number[2]}: a number has digits on both sides of its point"
        message = f"{message[: found.start()]}in line {found[1]}, column {found[2]}: {line[:80]}"
    return f"is not valid TOML: {message}", hint


def _file_fault(key: str, problem: str, hint: str, source: str | Path) -> ConfigError:
    return ConfigError([ConfigIssue(key, problem, hint, str(source))], where=str(source))


def _files_near(folder: Path) -> str:
    """List the TOML files in a folder."""
    try:
        names = sorted(file.name for file in folder.glob("*.toml"))
    except OSError:
        names = []
    if not names:
        return f"there are no TOML files in {folder}"
    return f"in {folder} there are: {', '.join(names[:12])}"


def _merge(base: Tree, over: Tree) -> Tree:
    merged = dict(base)
    for name, value in over.items():
        below = merged.get(name)
        merged[name] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
