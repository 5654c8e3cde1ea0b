"""The interface of a stored step, as far as code that restores a state needs it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from kempnerforge.checkpoint.format.tensor_index import Index


class StoredStep(Protocol):
    """A stored step. ``SafetensorsReader`` is one."""

    @property
    def path(self) -> Path:
        """The step's folder."""
        ...

    @property
    def index(self) -> Index:
        """The step's index: tensor name -> entry."""
        ...

    @property
    def raw_objects(self) -> dict[str, Any]:
        """The step's non-tensor leaves, by name, as JSON."""
        ...

    def make_tensor(self, name: str, tag: Mapping[str, Any]) -> torch.Tensor:
        """Return an empty tensor to fill, with the stored shape and dtype. ``name`` is inside a leaf."""
        ...
