"""Find the parts of a tensor that a rank holds, and check which tensors and names a checkpoint can hold.

Planning, staging and loading all use this module, so that they treat every kind of tensor in the
same way: plain tensors, DTensors (also with a ``LocalShardsWrapper`` inside), and ShardedTensors.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from kempnerforge.checkpoint.format.dtypes import DTYPE_NAMES
from kempnerforge.checkpoint.format.structure import RESERVED
from kempnerforge.torch_compat import (
    AsyncCollectiveTensor,
    LocalShardsWrapper,
    ShardedTensor,
    StridedShard,
    compute_local_shape_and_global_offset,
)

MAX_NAME_BYTES = 0xFFFF
"""A record of ``index.bin`` has two bytes for the length of a name."""
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_OF_SHARDS = (ShardedTensor, LocalShardsWrapper)

Sizes = tuple[int, ...]
Box = tuple[Sizes, Sizes]
"""Sizes and offsets."""


class Piece(NamedTuple):
    """A part of a tensor that this rank holds."""

    offsets: Sizes
    """Its offsets in the whole tensor."""
    sizes: Sizes
    tensor: torch.Tensor
    """Plain and detached. Shares memory with the original tensor."""


class Boxes:
    """The part of each DTensor that this rank holds, computed once per layout."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], Box] = {}

    def of(self, name: str, tensor: DTensor) -> Box:
        """Return sizes and offsets of this rank's part.

        Raises TypeError, which names the leaf, if it is not a box.
        """
        key = (tensor.shape, tensor.device_mesh, tensor.placements)
        if key not in self._known:
            sizes, offsets = compute_local_shape_and_global_offset(*key)
            self._known[key] = tuple(sizes), tuple(offsets)
            if any(isinstance(placement, StridedShard) for placement in tensor.placements):
                _check_box(name, tensor, self._known[key])
        return self._known[key]


def _check_box(name: str, tensor: DTensor, box: Box) -> None:
    """Raise TypeError unless this rank's rows are contiguous in the whole tensor."""
    coordinate = tensor.device_mesh.get_coordinate() or ()
    for dim, (size, offset) in enumerate(zip(*box, strict=True)):
        rows = torch.arange(tensor.shape[dim], device="cpu")
        for mesh_dim, placement in enumerate(tensor.placements):
            if isinstance(placement, (Shard, StridedShard)) and placement.dim == dim:
                along = type(placement)(0, **_factor(placement))
                parts, _ = along._split_tensor(rows, tensor.device_mesh.size(mesh_dim), with_padding=False)
                rows = parts[coordinate[mesh_dim]]
        if not torch.equal(rows, torch.arange(offset, offset + size, device="cpu")):
            raise TypeError(
                f"{name} is placed as {tensor.placements}, with which a rank's rows are not "
                "contiguous: redistribute it to Shard() first"
            )


def _factor(placement: Shard | StridedShard) -> dict[str, Any]:
    return {"split_factor": placement.split_factor} if isinstance(placement, StridedShard) else {}


def check_name(name: str) -> None:
    """Raise ValueError, which names the leaf, for a name that a checkpoint cannot hold."""
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{_short(name)}: a name must not have lone surrogates") from None
    if length > MAX_NAME_BYTES:
        raise ValueError(f"{_short(name)}: the name has {length} bytes, of at most {MAX_NAME_BYTES}")
    if name in RESERVED:
        raise ValueError(f"{name} is reserved: give the leaf another name")
    if "\0" in name:
        raise ValueError(f"{_short(name)}: a name must not contain NUL")


def _short(name: str) -> str:
    shown = ascii(name)
    return shown if len(shown) <= 80 else f"{shown[:60]}...' ({len(name)} characters)"


def check_storable(name: str, tensor: torch.Tensor) -> None:
    """Raise TypeError, which names the leaf, for a tensor that a checkpoint cannot hold exactly.

    These are meta, sparse, quantized and nested tensors, partial DTensors, wrapper subclasses
    without their own memory, and dtypes that safetensors does not support.
    """
    if problem := _problem(tensor):
        raise TypeError(f"{name} {problem}")
    if (dtype := dtype_of(tensor)) not in DTYPE_NAMES:
        raise TypeError(f"{name} has dtype {dtype}, which safetensors does not support: convert it first")


def check_target(name: str, tensor: torch.Tensor) -> None:
    """Raise TypeError, which names the leaf, for a tensor that a load cannot fill."""
    if problem := _problem(tensor):
        raise TypeError(f"{name} {problem}: it cannot be filled from a checkpoint")


def _problem(tensor: torch.Tensor) -> str:
    """Return why a tensor cannot be stored and filled through its memory; empty if it can."""
    if type(tensor) not in _PLAIN:
        if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
            return "is not initialized yet"
        if isinstance(tensor, DTensor):
            if any(placement.is_partial() for placement in tensor.placements):
                return "is a partial DTensor: redistribute it to Replicate() or Shard() first"
            return _problem(_local(tensor))
        if isinstance(tensor, AsyncCollectiveTensor):
            return ""
        if isinstance(tensor, _OF_SHARDS):
            return next((problem for shard in _shards(tensor) if (problem := _problem(shard))), "")
    if tensor.is_nested:
        return "is a nested tensor: store its values and offsets"
    if tensor.layout is not torch.strided:
        return f"has layout {tensor.layout}: store it as a dense tensor, or its indices and values"
    if tensor.is_meta:
        return "is on the meta device and has no values"
    if tensor.is_quantized:
        return "is quantized: store its int_repr() and its scales"
    if type(tensor) not in _PLAIN and _has_no_memory(tensor):
        kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
        return f"is a {kind}, which has no memory of its own: use its inner tensors"
    return ""


def _shards(tensor: ShardedTensor | LocalShardsWrapper) -> list[torch.Tensor]:
    if isinstance(tensor, ShardedTensor):
        return [shard.tensor for shard in tensor.local_shards()]
    return tensor.local_shards()


def dtype_of(tensor: torch.Tensor) -> torch.dtype:
    """Return the dtype of a tensor's elements. ``LocalShardsWrapper`` itself always has the default dtype."""
    if type(tensor) in _PLAIN:
        return tensor.dtype
    local = _local(tensor) if isinstance(tensor, DTensor) else tensor
    if isinstance(local, LocalShardsWrapper) and local.local_shards():
        return local.local_shards()[0].dtype
    return tensor.dtype


def _has_no_memory(tensor: torch.Tensor) -> bool:
    own, default = (getattr(kind, "__torch_dispatch__", None) for kind in (type(tensor), torch.Tensor))
    try:
        return own is not default and tensor.data_ptr() == 0
    except RuntimeError:  # raised by torch if there is none
        return True


def _local(tensor: DTensor) -> torch.Tensor:
    with torch.no_grad():  # otherwise ``to_local`` adds a node to the autograd graph
        return tensor.to_local()


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a plain tensor or a DTensor, sharing memory."""
    return plain(tensor.to_local() if isinstance(tensor, DTensor) else tensor)


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return a plain tensor without gradient that shares memory with ``tensor``."""
    if type(tensor) in _PLAIN:
        return tensor.detach()
    if type(tensor) is LocalShardsWrapper:  # its ``detach`` modifies it
        return tensor
    if isinstance(tensor, AsyncCollectiveTensor):  # from a redistribution that may be in progress
        return plain(tensor.wait())
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        return tensor.detach().as_subclass(torch.Tensor)


def local_pieces(name: str, tensor: torch.Tensor, boxes: Boxes | None = None) -> list[Piece]:
    """Return this rank's pieces of a tensor that passed ``check_storable`` or ``check_target``.

    Raises TypeError, which names the leaf, for a DTensor whose local rows are not contiguous.
    """
    if isinstance(tensor, DTensor):
        if tensor.device_mesh.get_coordinate() is None:
            return []
        local = _local(tensor)
        if isinstance(local, LocalShardsWrapper):
            return local_pieces(name, local)
        sizes, offsets = (boxes or Boxes()).of(name, tensor)
        return [Piece(offsets, sizes, plain(local))]
    if isinstance(tensor, ShardedTensor):
        return [
            Piece(_add(shard.metadata.shard_offsets, inner.offsets), inner.sizes, inner.tensor)
            for shard in tensor.local_shards()
            for inner in local_pieces(name, shard.tensor)
        ]
    if isinstance(tensor, LocalShardsWrapper):
        return [
            Piece(tuple(offsets), tuple(shard.shape), plain(shard))
            for shard, offsets in zip(tensor.local_shards(), tensor.local_offsets(), strict=False)
        ]
    return [Piece((0,) * tensor.ndim, tuple(tensor.shape), plain(tensor))]


def _add(offsets: Sequence[int], inner: Sizes) -> Sizes:
    return tuple(map(operator.add, offsets, inner))


def piece_at(name: str, tensor: torch.Tensor, offsets: Sizes) -> torch.Tensor:
    """Return this rank's piece at ``offsets``. Fast for plain tensors and DTensors, which have one piece.

    Raises ValueError if there is none.
    """
    if type(tensor) in _PLAIN:
        return tensor.detach()
    if type(tensor) is DTensor and type(local := tensor.to_local()) is torch.Tensor:
        return local.detach()
    for piece in local_pieces(name, tensor):
        if piece.offsets == offsets:
            return piece.tensor
    raise ValueError(f"{name} no longer has a part at {offsets} on this rank")


def global_shape(tensor: torch.Tensor) -> Sizes:
    """Return the shape of the whole tensor."""
    return tuple(tensor.metadata().size) if isinstance(tensor, ShardedTensor) else tuple(tensor.shape)
