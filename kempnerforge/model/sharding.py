"""Where this rank's part of a tensor lies in the whole tensor."""

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
    """The part of ``tensor`` that this rank holds: all of a plain tensor, the local shard of a DTensor.

    Raises ValueError for a placement that is no box of the whole tensor, such as ``Partial``.
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
    """The part of a tensor of ``shape`` that the rank at ``coordinate`` of a mesh holds.

    Each mesh dimension in turn cuts what the ones before it left, as ``torch.chunk`` does, so shards may be
    uneven or empty. The order is the mesh's, except that a strided shard (FSDP over tensor parallelism on the
    same tensor dimension) is cut after those of the following mesh dimensions that make its split factor.
    """
    start, size = [0] * len(shape), list(shape)
    for tensor_dim in range(len(shape)):
        for mesh_dim in _cutting_order(tensor_dim, mesh_shape, placements):
            chunk = -(-size[tensor_dim] // mesh_shape[mesh_dim])
            first = min(chunk * coordinate[mesh_dim], size[tensor_dim])
            start[tensor_dim] += first
            size[tensor_dim] = min(chunk, size[tensor_dim] - first)
    return Box(tuple(start), tuple(size))


def _cutting_order(tensor_dim: int, mesh_shape: Sequence[int], placements: Sequence[Placement]) -> list[int]:
    """Mesh dimensions that cut ``tensor_dim``, the first cut first."""
    order: list[int] = []
    for mesh_dim in reversed(range(len(placements))):
        placement = placements[mesh_dim]
        if isinstance(placement, Replicate):
            continue
        # Read by attribute: the strided shard's class is no Shard and has no public name.
        dim, split_factor = getattr(placement, "dim", None), getattr(placement, "split_factor", 1)
        if dim is None:
            raise ValueError(f"{placement} is neither a shard nor a copy")
        if dim != tensor_dim:
            continue
        position = 0
        while math.prod(mesh_shape[i] for i in order[:position]) != split_factor:
            position += 1
            if position > len(order):
                raise ValueError(f"{placements} over mesh {tuple(mesh_shape)}: no order of cuts fits")
        order.insert(position, mesh_dim)
    return order
