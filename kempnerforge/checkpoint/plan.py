"""Who writes which chunk into which file. Made once; repeated saves compare digests instead.

DCP says which chunks of each tensor a rank holds. From there on this is our own arithmetic, because DCP's
planning costs seconds at hundreds of ranks and gathers pickled metadata at every save.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from kempnerforge.checkpoint import layout
from kempnerforge.checkpoint.commit import Expected, PlannedFile, PlannedItem
from kempnerforge.checkpoint.dtypes import DTYPE_NAMES
from kempnerforge.checkpoint.index import Chunk, TensorEntry, cover_problem
from kempnerforge.checkpoint.shards import ShardItem, split_by_name


@dataclass(frozen=True)
class SavePlan:
    """What every rank writes."""

    files: tuple[tuple[PlannedFile, ...], ...]
    """By rank."""

    @property
    def expected(self) -> Expected:
        """All of it, for the check at the commit."""
        return Expected(tuple(file for of_rank in self.files for file in of_rank))


def held_chunks(tensors: Mapping[str, torch.Tensor]) -> list[PlannedItem]:
    """The chunks of ``tensors`` that this rank holds, sorted by name.

    Chunks without elements are left out, unless the whole tensor has none. Raises TypeError, naming the
    tensor, for a dtype or a kind of tensor that a shard file cannot hold.
    """
    writes = create_default_local_save_plan(dict(tensors), is_coordinator=True).items
    held = [chunk for write in writes if (chunk := planned_item(write)) is not None]
    return sorted(held, key=lambda chunk: (chunk.item.name, chunk.item.offsets))


def planned_item(write: WriteItem) -> PlannedItem | None:
    """What DCP's item says; None for a chunk without elements of a tensor that has some. Raises TypeError."""
    data, name = write.tensor_data, write.index.fqn
    if write.type == WriteItemType.BYTE_IO or data is None:
        raise TypeError(f"{name} is no tensor; AsyncCheckpointer saves other leaves too")
    if data.properties.dtype not in DTYPE_NAMES:
        raise TypeError(f"{name} has dtype {data.properties.dtype}, which safetensors does not know")
    dtype = DTYPE_NAMES[data.properties.dtype]
    item = ShardItem(name, dtype, tuple(data.chunk.offsets), tuple(data.chunk.sizes))
    if item.size_bytes == 0 and torch.Size(data.size).numel():
        return None
    return PlannedItem(item, tuple(data.size))


Signature = tuple[tuple[Any, ...], ...]
"""What the chunks that a rank holds follow from, cheap to make and to compare."""


def signature_of(tensors: Mapping[str, torch.Tensor]) -> Signature | None:
    """Equal signatures, equal ``held_chunks``; None when a tensor is of a kind of which only DCP knows.

    Asking DCP takes 0.1 ms a tensor, more than staging a small one: too much for every save.
    """
    found: list[tuple[Any, ...]] = []
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            found.append((name, tensor.dtype, tensor.shape, tensor.placements, tensor.device_mesh))
        elif type(tensor) in (torch.Tensor, torch.nn.Parameter):
            found.append((name, tensor.dtype, tensor.shape))
        else:
            return None
    return tuple(found)


def digest_of(held: Sequence[PlannedItem]) -> str:
    """Digest of what a rank holds: names, dtypes, shapes and offsets."""
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
                raise ValueError(f"ranks disagree on {chunk.item.name} at {chunk.item.offsets}")
            holders.setdefault(key, []).append(rank)
    _check_cover(chunks.values())
    mine: list[list[PlannedItem]] = [[] for _ in held_by_rank]
    load = [0] * len(held_by_rank)
    # The large ones first, those with one holder before all: they have no choice.
    for key in sorted(chunks, key=lambda key: (len(holders[key]) > 1, -chunks[key].item.size_bytes, key)):
        rank = min(holders[key], key=lambda rank: (load[rank], rank))
        load[rank] += chunks[key].item.size_bytes
        mine[rank].append(chunks[key])
    return name_files(mine)


def _check_cover(chunks: Iterable[PlannedItem]) -> None:
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
            of_rank.append(PlannedFile(layout.shard_name(number, count), items))
            number += 1
        files.append(tuple(of_rank))
    return SavePlan(tuple(files))


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, sharing memory."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()
