"""Split a state dict into tensors, other leaves, and their paths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor

from kempnerforge.checkpoint.format.json_values import MAX_DEPTH
from kempnerforge.checkpoint.format.structure import FLAT, Key, Path, Structure, name_of
from kempnerforge.checkpoint.results import Payload
from kempnerforge.checkpoint.state.pieces import check_name, check_storable
from kempnerforge.checkpoint.state.tensor_leaves import Packer
from kempnerforge.torch_compat import LocalShardsWrapper, ShardedTensor


@dataclass(frozen=True)
class TreePayload(Payload):
    """A flattened state dict, ready to be saved."""

    structure: Structure = FLAT


def payload_of(state_dict: Mapping[Any, Any]) -> TreePayload:
    """Return a state dict's tensors, its other leaves as JSON, and their paths.

    Names are those of DCP: keys as strings, joined by dots. Unlike in DCP, empty dicts are kept.
    Raises TypeError, which names the leaf, for values that a checkpoint cannot hold, and ValueError
    for duplicate and invalid names.
    """
    if all(isinstance(value, torch.Tensor) for value in state_dict.values()) and all(
        type(key) is str for key in state_dict
    ):
        return TreePayload(state_dict)  # flat: walking it would take as long as a small save
    found = _Flattener()
    for key, value in state_dict.items():
        found.visit((str(key),), value.state_dict() if isinstance(value, Stateful) else value)
    return found.payload()


class _Flattener:
    """Walks dicts and lists as DCP does: a list without dicts and tensors is one leaf."""

    def __init__(self) -> None:
        self._paths: dict[str, Path] = {}
        self._empty: dict[str, Path] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        self._others: dict[str, Any] = {}

    def visit(self, path: Path, value: Any) -> None:
        """Collect the leaves of ``value`` at ``path``."""
        if isinstance(value, torch.Tensor):
            self._tensors[self._name(path, self._paths)] = value
        elif isinstance(value, Mapping):
            self._visit_all(path, [(str(key), child) for key, child in value.items()])
            if not value:
                self._empty_dict(path)
        elif isinstance(value, list) and not _is_leaf(value, 0):
            self._visit_all(path, list(enumerate(value)))
        else:
            self._others[self._name(path, self._paths)] = value

    def _visit_all(self, path: Path, children: list[tuple[Key, Any]]) -> None:
        if len(path) > MAX_DEPTH:
            raise TypeError(f"{name_of(path)[:200]} is nested more than {MAX_DEPTH} deep, or holds itself")
        for key, child in children:
            self.visit((*path, key), child)

    def _empty_dict(self, path: Path) -> None:
        name = self._name(path, self._empty)
        check_name(name)

    def _name(self, path: Path, into: dict[str, Path]) -> str:
        name = name_of(path)
        if name in self._paths or name in self._empty:
            raise ValueError(f"two leaves are called {name[:200]}")
        into[name] = path
        return name

    def payload(self) -> TreePayload:
        """Return everything that was collected."""
        packer = Packer()
        objects = {name: packer.pack(value, name=name) for name, value in self._others.items()}
        for name, tensor in packer.tensors.items():
            if isinstance(tensor, (DTensor, ShardedTensor, LocalShardsWrapper)):
                raise TypeError(
                    f"{name} is a {type(tensor).__name__} inside another leaf: put it into a dict or list"
                )
            check_storable(name, tensor)
            if name in self._tensors:
                raise ValueError(f"two leaves are called {name[:200]}")
        nested = self._empty or any(len(path) > 1 for path in self._paths.values())
        structure = Structure(self._paths, self._empty) if nested else FLAT
        return TreePayload({**self._tensors, **packer.tensors}, objects, structure=structure)


def _is_leaf(values: list[Any], depth: int) -> bool:
    """Return whether a list contains no dict and no tensor, also in nested lists."""
    if depth > MAX_DEPTH:
        return True  # packing it raises the error
    for value in values:
        if isinstance(value, (Mapping, torch.Tensor)):
            return False
        if isinstance(value, list) and not _is_leaf(value, depth + 1):
            return False
    return True
