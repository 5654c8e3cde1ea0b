"""The part of a tensor that a rank holds, as a box in the whole tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Placement


@dataclass(frozen=True)
class Box:
    """An axis-parallel part of a tensor: the first index and the length in every dimension."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def local_box(tensor: Tensor) -> Box:
    """Return the part of ``tensor`` that this rank holds: a whole plain tensor, or a DTensor's local shard.

    Raises ValueError for a placement that is not a box of the whole tensor, such as ``Partial``.
    """
    if not isinstance(tensor, DTensor):
        return Box((0,) * tensor.ndim, tuple(tensor.shape))
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        raise ValueError("this rank is not in the tensor's mesh")
    box = box_of(tensor.shape, tensor.device_mesh.shape, coordinate, tensor.placements)
    if box.shape != tuple(tensor.to_local().shape):
        raise ValueError(f"{tensor.placements} hold {tuple(tensor.to_local().shape)} here, expected {box}")
    return box


def box_of(
    shape: Sequence[int],
    mesh_shape: Sequence[int],
    coordinate: Sequence[int],
    placements: Sequence[Placement],
) -> Box:
    """Return the part of a tensor of ``shape`` that the rank at ``coordinate`` of a mesh holds.

    Each mesh dimension in turn splits the result of the ones before it, as ``torch.chunk`` does, so
    shards may be uneven or empty. The order is that of the mesh, except that a strided shard (FSDP
    over tensor parallelism on the same tensor dimension) is split after those following mesh
    dimensions whose product is its split factor.
    """
    start, size = [0] * len(shape), list(shape)
    for tensor_dim in range(len(shape)):
        for mesh_dim in _split_order(tensor_dim, mesh_shape, placements):
            chunk = -(-size[tensor_dim] // mesh_shape[mesh_dim])
            first = min(chunk * coordinate[mesh_dim], size[tensor_dim])
            start[tensor_dim] += first
            size[tensor_dim] = min(chunk, size[tensor_dim] - first)
    return Box(tuple(start), tuple(size))


def _split_order(tensor_dim: int, mesh_shape: Sequence[int], placements: Sequence[Placement]) -> list[int]:
    """Return the mesh dimensions that split ``tensor_dim``, in the order in which they split it."""
    order: list[int] = []
    for mesh_dim in reversed(range(len(placements))):
        placement = placements[mesh_dim]
        if isinstance(placement, Replicate):
            continue
        # Read as attributes: the class of a strided shard is not a Shard and has no public name.
        dim, split_factor = getattr(placement, "dim", None), getattr(placement, "split_factor", 1)
        if dim is None:
            raise ValueError(f"{placement} is neither a shard nor a replica")
        if dim != tensor_dim:
            continue
        position = 0
        while math.prod(mesh_shape[i] for i in order[:position]) != split_factor:
            position += 1
            if position > len(order):
                raise ValueError(f"{placements} over mesh {tuple(mesh_shape)}: no order of splits fits")
        order.insert(position, mesh_dim)
    return order
