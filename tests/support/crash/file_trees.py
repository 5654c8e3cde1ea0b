"""Folders represented as dictionaries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Tree = dict[str, Any]
"""Path below the root -> None for a folder, bytes for a file, str (the target) for a symbolic link."""


def write_tree(tree: Tree, folder: Path) -> None:
    """Create ``tree`` in the new folder ``folder``."""
    folder.mkdir(parents=True)
    for path, content in sorted(tree.items()):
        if content is None:
            (folder / path).mkdir()
        elif isinstance(content, str):
            (folder / path).symlink_to(content)
        else:
            (folder / path).write_bytes(content)


def read_tree(folder: Path) -> Tree:
    """Return the content of ``folder``."""
    found: Tree = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = (
            str(path.readlink()) if path.is_symlink() else None if path.is_dir() else path.read_bytes()
        )
    return found
