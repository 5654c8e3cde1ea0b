"""Paths of the leaves of a nested state dict. A load without a target rebuilds the dict from them.

A leaf's name is its path joined by dots: ``{"model": {"w": t}}`` has ``model.w``. Lists, and dots
in keys, make names ambiguous, and empty dicts have no leaf. Therefore ``train_state.json`` of a
nested state dict has::

    "__paths__": {"tree": {"model": {}, "list": [[0, {}]], "empty": null}, "other": {"a.b": ["a.b"]}}

``tree`` has only the containers: an object is a dict, an array of pairs (position, container) is a
list, and null is an empty dict. A leaf belongs to the container with the longest name that is a
prefix of its own. ``other`` has the paths of leaves for which that is wrong. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

PATHS = "__paths__"
"""The key in ``train_state.json``."""
RESERVED = ("__metadata__", PATHS)
"""Names that no leaf can have. Safetensors uses the first."""

Key = str | int
Path = tuple[Key, ...]
"""A string is a key of a dict, a number a position in a list."""


@dataclass(frozen=True)
class Structure:
    """Paths of a state dict's leaves."""

    paths: Mapping[str, Path] = field(default_factory=dict)
    """By name of the leaf. A leaf without an entry is at the top level."""
    empty: Mapping[str, Path] = field(default_factory=dict)
    """Empty dicts, by name."""
    bare_lists: tuple[Path, ...] = ()
    """Lists that contain empty dicts and no other dicts. ``decode`` fills this in. It is empty for
    state dicts saved by DCP's own planner, which leaves out empty dicts."""

    def path(self, name: str) -> Path:
        """Return the path of a leaf."""
        return self.paths.get(name) or self.empty.get(name) or (name,)


FLAT = Structure()


def name_of(path: Path) -> str:
    """Return the name of a leaf."""
    return ".".join(map(str, path))


def encode(structure: Structure) -> dict[str, Any] | None:
    """Return ``structure`` as JSON; None if every leaf is at the top level."""
    tree: dict[Key, Any] = {}
    made: dict[Path, dict[Key, Any]] = {(): tree}
    kinds: dict[Path, bool] = {}

    def container(path: Path) -> dict[Key, Any]:
        if path not in made:
            made[path] = container(path[:-1])[path[-1]] = {}
        return made[path]

    for path in structure.paths.values():
        for depth in range(1, len(path)):
            if (inside := path[:depth]) not in kinds:
                container(inside)
                kinds[inside] = isinstance(path[depth], int)
    for path in structure.empty.values():
        container(path[:-1])[path[-1]] = None
        for depth in range(1, len(path)):
            kinds.setdefault(path[:depth], isinstance(path[depth], int))
    body = {"tree": _tree_json(tree, (), kinds)}
    rule = _Rule(body["tree"])
    other = {name: list(path) for name, path in structure.paths.items() if rule.path(name) != path}
    if not tree and not other:
        return None
    return {**body, "other": other} if other else body


def _tree_json(node: dict[Key, Any] | None, path: Path, kinds: dict[Path, bool]) -> Any:
    if node is None:
        return None
    inner = {key: _tree_json(child, (*path, key), kinds) for key, child in node.items()}
    return [[key, child] for key, child in inner.items()] if kinds.get(path) else inner


def decode(body: Any) -> Structure:
    """Invert ``encode``. Paths are found on access. Raises ValueError, TypeError."""
    if body is None:
        return FLAT
    if not isinstance(body, dict) or not isinstance(body.get("tree"), dict):
        raise ValueError(f"{PATHS} has no tree")
    rule = _Rule(body["tree"])
    other = {name: _checked(path) for name, path in body.get("other", {}).items()}
    return Structure(_Lookup(rule, other), rule.empty, tuple(_bare_lists(body["tree"], ())))


def _bare_lists(node: Any, path: Path) -> Iterator[Path]:
    if isinstance(node, list) and _is_bare(node):
        if _has_empty_dict(node):
            yield path
        return
    for key, child in _children(node):
        yield from _bare_lists(child, (*path, key))


def _is_bare(node: Any) -> bool:
    return node is None or (isinstance(node, list) and all(_is_bare(child) for _, child in node))


def _has_empty_dict(node: Any) -> bool:
    return node is None or any(_has_empty_dict(child) for _, child in node)


def _children(node: Any) -> Iterable[tuple[Key, Any]]:
    if isinstance(node, dict):
        return node.items()
    return [(key, child) for key, child in node or ()]


def _checked(path: Any) -> Path:
    if not isinstance(path, list) or not path or not all(type(key) in (str, int) for key in path):
        raise ValueError(f"{path!r} is not the path of a leaf")
    return tuple(path)


class _Rule:
    """Finds the path of a name in a tree of containers."""

    def __init__(self, tree: Any) -> None:
        self.empty: dict[str, Path] = {}
        self._containers: dict[str, tuple[Path, bool]] = {}
        self._collect(tree, ())

    def _collect(self, node: Any, path: Path) -> None:
        if node is None:
            self.empty[name_of(path)] = path
            return
        if path:
            self._containers.setdefault(name_of(path), (path, isinstance(node, list)))
        for key, child in _children(node):
            if type(key) not in (str, int):
                raise ValueError(f"{key!r} is not a key of a container")
            self._collect(child, (*path, key))

    def path(self, name: str) -> Path:
        end = len(name)
        while (end := name.rfind(".", 0, end)) >= 0:
            if found := self._containers.get(name[:end]):
                path, is_list = found
                key = name[end + 1 :]
                return (*path, int(key) if is_list and key.isdecimal() else key)
        return (name,)


class _Lookup(Mapping[str, Path]):
    """Paths by name. The leaves are not listed in it, so iteration yields only ``other``."""

    def __init__(self, rule: _Rule, other: dict[str, Path]) -> None:
        self._rule = rule
        self._other = other

    def __getitem__(self, name: str) -> Path:
        return self._other.get(name) or self._rule.path(name)

    def __iter__(self) -> Any:
        return iter(self._other)

    def __len__(self) -> int:
        return len(self._other)


def merge(by_rank: Iterable[tuple[Any, Iterable[str]]]) -> dict[str, Any] | None:
    """Merge (JSON, names of leaves) of all ranks. If ranks differ, the first path of a name is used."""
    paths: dict[str, Path] = {}
    empty: dict[str, Path] = {}
    for body, names in by_rank:
        structure = decode(body)
        for name in names:
            paths.setdefault(name, structure.path(name))
        for name, path in structure.empty.items():
            empty.setdefault(name, path)
    # A dict that is empty on one rank only is not empty.
    filled = {path[:depth] for path in paths.values() for depth in range(1, len(path))}
    empty = {name: path for name, path in empty.items() if path not in filled and name not in paths}
    return encode(Structure(paths, empty))
