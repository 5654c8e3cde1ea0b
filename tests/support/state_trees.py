"""State dicts for round trips: targets of a load, and comparisons that include types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


class Wrapper(torch.Tensor):
    """Like a tensor of torchao: it has no memory of its own and creates its values on request."""

    _made_from: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> Wrapper:
        made = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)  # type: ignore[attr-defined]
        made._made_from = values
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [one._made_from.clone() if isinstance(one, Wrapper) else one for one in args]
        return func(*plain, **(kwargs or {}))


def blank(value: Any) -> Any:
    """Return a target for ``dcp.load`` with the same structure: tensors of ones, None for other leaves."""
    if isinstance(value, torch.Tensor):
        return torch.ones(value.shape).to(value.dtype)
    if isinstance(value, Mapping):
        return {key: blank(child) for key, child in value.items()}
    if isinstance(value, list) and any(isinstance(child, (Mapping, list, torch.Tensor)) for child in value):
        return [blank(child) for child in value]
    return None


def nested(value: Any) -> Any:
    """Return the structure as DCP builds it: dicts, lists, and keys that are text."""
    if isinstance(value, Mapping):
        return {str(key): nested(child) for key, child in value.items()}
    if type(value) is list:
        return [nested(child) for child in value]
    return value


def same(one: Any, other: Any) -> bool:
    """Return whether two values are bitwise equal and have the same types."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and _bits(one) == _bits(other)
    if type(one) is not type(other):
        return False
    if isinstance(one, (np.ndarray, np.generic)):
        return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if hasattr(one, "getvalue"):
        return (one.getvalue(), one.tell()) == (other.getvalue(), other.tell())
    if isinstance(one, float):
        return repr(one) == repr(other)
    return bool(one == other)


def _bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    host = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return host.dtype, tuple(host.shape), bytes(host.view(-1).view(torch.uint8).tolist())
