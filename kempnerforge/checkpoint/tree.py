"""A state dict's tensors and its other leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.stateful import Stateful

from kempnerforge.checkpoint import leaves


def split_leaves(state_dict: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A state dict's tensors, and its other leaves as JSON, by DCP's flattened names.

    Raises TypeError, naming the leaf, for what a checkpoint cannot hold.
    """
    tensors = {name: value for name, value in state_dict.items() if isinstance(value, torch.Tensor)}
    if len(tensors) == len(state_dict):  # flat already; looking closer costs as much as a small save
        return tensors, {}
    plain = {
        name: value.state_dict() if name not in tensors and isinstance(value, Stateful) else value
        for name, value in state_dict.items()
    }
    flat, _ = flatten_state_dict(plain)
    tensors = {name: value for name, value in flat.items() if isinstance(value, torch.Tensor)}
    objects = {name: leaves.encode(value, name=name) for name, value in flat.items() if name not in tensors}
    return tensors, objects
