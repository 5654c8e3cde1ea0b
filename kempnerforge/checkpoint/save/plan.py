"""Who writes which chunk into which file. Made once; repeated saves compare digests instead.

Our own arithmetic, because DCP's planning costs seconds at hundreds of ranks and gathers pickled metadata at
every save.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch.distributed.tensor import DTensor

from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.format.dtypes import DTYPE_NAMES
from kempnerforge.checkpoint.format.safetensors_file import ShardItem, split_by_name
from kempnerforge.checkpoint.format.tensor_index import Chunk, TensorEntry, cover_problem
from kempnerforge.checkpoint.save.commit import ExpectedFiles, PlannedFile, PlannedItem
from kempnerforge.checkpoint.state.pieces import (
    Boxes,
    check_name,
    check_storable,
    dtype_of,
    global_shape,
    local_pieces,
)


@dataclass(frozen=True)
class SavePlan:
    """What every rank writes."""

    files: tuple[tuple[PlannedFile, ...], ...]
    """By rank."""

    @property
    def expected(self) -> ExpectedFiles:
        """All of it, for the check at the commit."""
        return ExpectedFiles(tuple(file for of_rank in self.files for file in of_rank))


def held_chunks(tensors: Mapping[str, torch.Tensor]) -> list[PlannedItem]:
    """The chunks of ``tensors`` that this rank holds, sorted by name.

    Chunks without elements are left out, unless the whole tensor has none. Raises TypeError and ValueError,
    naming the tensor, for a kind of tensor, a dtype or a name that a checkpoint cannot hold.
    """
    boxes, held = Boxes(), []
    for name, tensor in tensors.items():
        check_name(name)
        check_storable(name, tensor)
        shape, dtype = global_shape(tensor), DTYPE_NAMES[dtype_of(tensor)]
        for piece in local_pieces(name, tensor, boxes):
            chunk = planned_item(name, dtype, piece.offsets, piece.sizes, shape)
            if chunk is not None:
                held.append(chunk)
    return sorted(held, key=lambda chunk: (chunk.item.name, chunk.item.offsets))


def planned_item(
    name: str, dtype: str, offsets: Sequence[int], sizes: Sequence[int], shape: Sequence[int]
) -> PlannedItem | None:
    """A chunk as it is planned; None for one without elements of a tensor that has some."""
    if 0 in sizes and 0 not in shape:
        return None
    return PlannedItem(ShardItem(name, dtype, tuple(offsets), tuple(sizes)), tuple(shape))


Signature = tuple[tuple[Any, ...], ...]
"""What the chunks that a rank holds follow from, cheap to make and to compare."""


def signature_of(tensors: Mapping[str, torch.Tensor]) -> Signature | None:
    """Equal signatures, equal ``held_chunks``; None when there is a tensor of another kind.

    Planning takes longer than staging a small tensor: too much for every save.
    """
    found: list[tuple[Any, ...]] = []
    for name, tensor in tensors.items():
        if type(tensor) in (torch.Tensor, torch.nn.Parameter):
            if tensor.is_nested:  # it has no shape
                return None
            found.append((name, tensor.dtype, tensor.shape, tensor.layout, tensor.is_meta))
        elif isinstance(tensor, DTensor) and type(tensor._local_tensor) in (torch.Tensor, torch.nn.Parameter):
            found.append((name, tensor.dtype, tensor.shape, tensor.placements, tensor.device_mesh))
        else:
            return None
    return tuple(found)


def digest_of(held: object) -> str:
    """Digest of what a rank holds: names, dtypes, shapes, offsets, other leaves."""
    return xxhash.xxh3_128_hexdigest(repr(held).encode())


def make_plan(held_by_rank: Sequence[Sequence[PlannedItem]]) -> SavePlan:
    """Share out the chunks of all ranks, each to one of its holders, bytes as even as they can be.

    Raises ValueError when the chunks of a tensor do not cover it exactly, or disagree on its shape.
    """
    holders: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    chunks: dict[tuple[str, tuple[int, ...]], PlannedItem] = {}
    for rank, held in enumerate(held_by_rank):
        for chunk in held:
            key = (chunk.item.name, chunk.item.offsets)
            if chunks.setdefault(key, chunk) != chunk:
                other = chunks[key]
                raise ValueError(
                    f"{chunk.item.name} is {_words(other)} on rank {holders[key][0]} and {_words(chunk)} on "
                    f"rank {rank}: it must be the same on all ranks that have it"
                )
            holders.setdefault(key, []).append(rank)
    check_cover(chunks.values())
    mine: list[list[PlannedItem]] = [[] for _ in held_by_rank]
    load = [0] * len(held_by_rank)
    # The large ones first, those with one holder before all: they have no choice.
    for key in sorted(chunks, key=lambda key: (len(holders[key]) > 1, -chunks[key].item.size_bytes, key)):
        rank = min(holders[key], key=lambda rank: (load[rank], rank))
        load[rank] += chunks[key].item.size_bytes
        mine[rank].append(chunks[key])
    return name_files(mine)


def _words(chunk: PlannedItem) -> str:
    return f"{chunk.item.dtype} {chunk.item.sizes} of {chunk.global_shape}"


def check_cover(chunks: Iterable[PlannedItem]) -> None:
    """Raise ValueError, naming the tensor, when chunks do not cover it exactly or disagree on its shape."""
    by_name: dict[str, list[PlannedItem]] = {}
    for chunk in chunks:
        by_name.setdefault(chunk.item.name, []).append(chunk)
    for name, parts in by_name.items():
        shape, dtype = parts[0].global_shape, parts[0].item.dtype
        if any((part.global_shape, part.item.dtype) != (shape, dtype) for part in parts):
            raise ValueError(f"ranks disagree on shape or dtype of {name}")
        boxes = tuple(Chunk("", 0, p.item.size_bytes, p.item.offsets, p.item.sizes) for p in parts)
        if problem := cover_problem(TensorEntry(dtype, shape, boxes)):
            raise ValueError(f"{name}: {problem}")


def name_files(by_rank: Sequence[Sequence[PlannedItem]]) -> SavePlan:
    """Files for what each rank writes, numbered over all ranks; a name occurs once in a file."""
    splits = [split_by_name([chunk.item.name for chunk in chunks]) for chunks in by_rank]
    count, number = sum(map(len, splits)), 0
    files: list[tuple[PlannedFile, ...]] = []
    for chunks, split in zip(by_rank, splits, strict=True):
        of_rank = []
        for positions in split:
            items = tuple(chunks[place] for place in positions)
            of_rank.append(PlannedFile(paths.shard_name(number, count), items))
            number += 1
        files.append(tuple(of_rank))
    return SavePlan(tuple(files))
