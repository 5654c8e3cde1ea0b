"""Initial weights that do not depend on how the model is sharded.

A weight is divided into blocks of 2**20 elements of the contiguous whole tensor. Each block has its
own CPU generator, keyed by the seed, the weight's name and the block's number, and is always
generated whole. A rank generates the blocks that overlap its shard, one at a time, and copies the
overlap. Runs with any number of processes and any layout thus start from the same bits, and no rank
holds more than one block in addition to its shard.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import xxhash
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kempnerforge.model.sharding import Box, local_box

BLOCK_NUMEL = 2**20
RESIDUAL_OUTPUTS = ("attention.wo.weight", "feed_forward.w2.weight")


@torch.no_grad()
def init_weights_(model: nn.Module, *, seed: int, init_std: float, n_layers: int) -> None:
    """Initialize every parameter in place and recompute non-persistent buffers.

    Linear and embedding weights are normal with standard deviation ``init_std``. Those that write
    to the residual stream (``wo``, ``w2``) are divided by sqrt(2 * n_layers), so that the variance
    of the stream does not grow with depth (GPT-2, section 2.3). Norms are ones. ``n_layers`` is
    that of the whole model, also when ``model`` is a pipeline stage.

    Not collective. Does not use the random state of the process. Raises TypeError for a parameter
    of a module type that has no rule.
    """
    for name, param in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, nn.RMSNorm):
            _local(param).fill_(1.0)
        elif isinstance(owner, nn.Linear | nn.Embedding):
            std = init_std / math.sqrt(2 * n_layers) if name.endswith(RESIDUAL_OUTPUTS) else init_std
            normal_(param, seed=seed, name=name, std=std)
        else:
            raise TypeError(f"no rule for the initial value of {name} in a {type(owner).__name__}")
    reset_buffers_(model)


def reset_buffers_(model: nn.Module) -> None:
    """Recompute non-persistent buffers. Not collective."""
    for module in model.modules():
        if callable(reset := getattr(module, "reset_buffers", None)):
            reset()


@torch.no_grad()
def normal_(tensor: Tensor, *, seed: int, name: str, std: float) -> None:
    """Fill this rank's part of ``tensor``, plain or DTensor, with the normal values of (seed, name).

    The values are generated in fp32 and cast to the tensor's dtype.
    """
    local, box, shape = _local(tensor), local_box(tensor), tuple(tensor.shape)
    numel = math.prod(shape)
    if box.numel == 0:
        return
    buffer = torch.empty(min(BLOCK_NUMEL, numel), dtype=torch.float32, device="cpu")
    first_block, last_block = _flat(box.start, shape) // BLOCK_NUMEL, _flat(_last(box), shape) // BLOCK_NUMEL
    for block in range(first_block, last_block + 1):
        start, stop = block * BLOCK_NUMEL, min((block + 1) * BLOCK_NUMEL, numel)
        pieces = _pieces(shape, start, stop)
        shared = [(piece, common) for piece in pieces if (common := _overlap(piece, box))]
        if not shared:
            continue
        values = buffer[: stop - start].normal_(0.0, std, generator=block_generator(seed, name, block))
        for piece, common in shared:
            first = _flat(piece.start, shape) - start
            source = values[first : first + piece.numel].view(piece.shape)
            local[_slices(common, box)].copy_(source[_slices(common, piece)])


def block_generator(seed: int, name: str, block: int) -> torch.Generator:
    """Return the CPU generator of one block, seeded by an xxh3-64 of its coordinates.

    torch's CPU generator (mt19937) uses the low 32 bits of a seed: two of n blocks share a stream
    with a probability of about n**2 / 2**33, which is 1 in 10**6 for a hundred million weights. A
    shared stream would do no harm.
    """
    key = xxhash.xxh3_64_intdigest(f"{seed}\0{name}\0{block}".encode())
    return torch.Generator(device="cpu").manual_seed(key)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _flat(index: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """Return the position of ``index`` in the contiguous tensor."""
    position = 0
    for i, length in zip(index, shape, strict=True):
        position = position * length + i
    return position


def _last(box: Box) -> tuple[int, ...]:
    return tuple(start + length - 1 for start, length in zip(box.start, box.shape, strict=True))


def _pieces(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Divide the flat range [start, stop) of a contiguous tensor into boxes that are contiguous in it.

    For a matrix these are the end of a row, whole rows, and the beginning of a row.
    """
    if len(shape) <= 1:
        yield Box((start,) * len(shape), (stop - start,) * len(shape))
        return
    inner = math.prod(shape[1:])
    first_whole, end_whole = -(-start // inner), stop // inner
    if first_whole > end_whole:
        yield from _row_pieces(shape, end_whole, start, stop)
        return
    if start < first_whole * inner:
        yield from _row_pieces(shape, first_whole - 1, start, first_whole * inner)
    if first_whole < end_whole:
        zeros = (0,) * (len(shape) - 1)
        yield Box((first_whole, *zeros), (end_whole - first_whole, *shape[1:]))
    if end_whole * inner < stop:
        yield from _row_pieces(shape, end_whole, end_whole * inner, stop)


def _row_pieces(shape: tuple[int, ...], row: int, start: int, stop: int) -> Iterator[Box]:
    """Divide a flat range that lies within one ``row`` of the first dimension."""
    offset = row * math.prod(shape[1:])
    for piece in _pieces(shape[1:], start - offset, stop - offset):
        yield Box((row, *piece.start), (1, *piece.shape))


def _overlap(a: Box, b: Box) -> Box | None:
    start = tuple(max(x, y) for x, y in zip(a.start, b.start, strict=True))
    stop = tuple(min(x + m, y + n) for x, m, y, n in zip(a.start, a.shape, b.start, b.shape, strict=True))
    shape = tuple(end - begin for begin, end in zip(start, stop, strict=True))
    return Box(start, shape) if all(length > 0 for length in shape) else None


def _slices(part: Box, whole: Box) -> tuple[slice, ...]:
    """Return ``part`` as an index into the tensor that holds ``whole``."""
    firsts = (a - b for a, b in zip(part.start, whole.start, strict=True))
    return tuple(slice(first, first + n) for first, n in zip(firsts, part.shape, strict=True))
