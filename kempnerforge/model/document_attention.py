"""Causal attention within documents, where several documents stand in one row.

What torch offers (documentation of 2.10 to 2.12, source of 2.13), and what is used:

- On CUDA: ``flex_attention`` with a block mask. It is one fused kernel for fp32 and bf16, shared
  key and value heads, and compiled models and others. Its backward adds nothing atomically, so the
  bits should repeat. Blocks of 128 x 128 pairs without a common document are skipped, and no T x T
  matrix exists. ``varlen_attn`` has no fp32, and needs the number of documents on the host: it would
  wait for the device in every micro-batch.
- On the CPU: the fused kernel of ``scaled_dot_product_attention``, document by document, as one
  operator. ``flex_attention`` has no backward there, and ``varlen_attn`` no kernel. A boolean mask
  costs a T x T matrix, and the time of all pairs.

Shape suffixes: B sequences, T tokens, H query heads, K key and value heads, E head width, N blocks
of tokens or documents.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

DocumentMask = Tensor | BlockMask
"""On the CPU the offsets of the documents, int64 [N + 1], in the B x T tokens. Else a block mask."""

BLOCK = 128
"""Tokens of a block of the block mask. It is torch's default."""
_MIN_HEAD_DIM = 16
"""The narrowest head that ``flex_attention`` takes on CUDA."""


def positions(document_ids_BT: Tensor) -> Tensor:
    """Return the position of each token in its document, int64 [B, T]. The device is not waited for."""
    index_T = torch.arange(document_ids_BT.size(1), device=document_ids_BT.device)
    return index_T - torch.where(_begins(document_ids_BT), index_T, 0).cummax(1).values


def document_mask(document_ids_BT: Tensor) -> DocumentMask:
    """Return what ``document_attention`` needs, for all layers of a micro-batch.

    The numbers of documents increase within a row. On CUDA the device is not waited for.
    """
    if document_ids_BT.device.type != "cpu":
        return block_mask(document_ids_BT)
    starts_N = _begins(document_ids_BT).flatten().nonzero().squeeze(1)
    return torch.cat([starts_N, starts_N.new_tensor([document_ids_BT.numel()])])


def document_attention(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, mask: DocumentMask) -> Tensor:
    """Attend within documents, causally, [B, H, T, E]. Groups of query heads may share a key head."""
    if isinstance(mask, BlockMask):
        return _flex(q_BHTE, k_BKTE, v_BKTE, mask)
    return _by_document(q_BHTE, k_BKTE, v_BKTE, mask)[0]


def _begins(document_ids_BT: Tensor) -> Tensor:
    """Return whether a document begins at a token, bool [B, T]. One does at the start of each row."""
    return F.pad(document_ids_BT[:, 1:] != document_ids_BT[:, :-1], (1, 0), value=True)


def block_mask(document_ids_BT: Tensor) -> BlockMask:
    """Return which pairs of blocks have pairs of tokens that attend, and in which of them all do.

    ``create_block_mask`` finds the same, but from a T x T matrix. Here the first and the last document
    of each block are enough, because the numbers of documents increase.
    """
    seq_len = document_ids_BT.size(1)
    num_blocks = -(-seq_len // BLOCK)
    block_N = torch.arange(num_blocks, device=document_ids_BT.device)
    ends_N = (block_N + 1) * BLOCK
    firsts_BN = document_ids_BT[:, block_N * BLOCK]
    lasts_BN = document_ids_BT[:, ends_N.clamp(max=seq_len) - 1]
    is_earlier_NN = block_N[None, :] < block_N[:, None]
    # Dimensions: blocks of queries, blocks of keys.
    reaches_BNN = lasts_BN[:, None, :] >= firsts_BN[:, :, None]
    some_BNN = reaches_BNN & (is_earlier_NN | (block_N[None, :] == block_N[:, None]))
    all_BNN = (firsts_BN[:, None, :] == lasts_BN[:, :, None]) & is_earlier_NN & (ends_N <= seq_len)[:, None]

    def attends(b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_ids_BT[b, query] == document_ids_BT[b, key])

    return BlockMask.from_kv_blocks(
        *_ordered(some_BNN & ~all_BNN),
        *_ordered(all_BNN),
        BLOCK_SIZE=BLOCK,
        mask_mod=attends,
        seq_lengths=(seq_len, seq_len),
    )


def _ordered(blocks_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of key blocks of each query block, and their indices, these first."""
    indices = torch.argsort(blocks_BNN.int(), dim=-1, descending=True, stable=True)
    return blocks_BNN.sum(-1, dtype=torch.int32)[:, None], indices.int()[:, None].contiguous()


def _flex(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, mask: BlockMask) -> Tensor:
    head_dim = q_BHTE.size(-1)
    if head_dim < _MIN_HEAD_DIM:
        wider = (0, _MIN_HEAD_DIM - head_dim)
        q_BHTE, k_BKTE, v_BKTE = (F.pad(x, wider) for x in (q_BHTE, k_BKTE, v_BKTE))
    attend = flex_attention if torch.compiler.is_compiling() else _fused_flex()
    mixed: Any = attend(
        q_BHTE,
        k_BKTE,
        v_BKTE,
        block_mask=mask,
        scale=head_dim**-0.5,
        enable_gqa=q_BHTE.size(1) != k_BKTE.size(1),
    )
    return mixed[..., :head_dim]


@functools.cache
def _fused_flex() -> Callable[..., Any]:
    # Without the compiler there is no fused kernel.
    return torch.compile(flex_attention, dynamic=False)


def _documents(offsets_N: Tensor, seq_len: int) -> Iterator[tuple[slice, slice]]:
    """Yield the row of each document and its tokens, as slices."""
    offsets = offsets_N.tolist()
    for begin, end in itertools.pairwise(offsets):
        row, first = divmod(begin, seq_len)
        yield slice(row, row + 1), slice(first, first + end - begin)


_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@torch.library.custom_op("kempnerforge::document_attention", mutates_args=(), device_types="cpu")
def _by_document(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the result, [B, H, T, E], and the logarithm of each softmax's denominator, [B, H, T]."""
    mixed, log_sums = _empty_results(q)
    for row, tokens in _documents(offsets, q.size(2)):
        parts = (x[row, :, tokens] for x in (q, k, v))
        mixed[row, :, tokens], log_sums[row, :, tokens] = _attend(*parts, 0.0, True)
    return mixed, log_sums


@_by_document.register_fake
def _(q: Tensor, _k: Tensor, _v: Tensor, _offsets: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_results(q)


def _empty_results(q: Tensor) -> tuple[Tensor, Tensor]:
    rows, heads, seq_len, _ = q.shape
    dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    return torch.empty_like(q), q.new_empty((rows, seq_len, heads), dtype=dtype).transpose(1, 2)


@torch.library.custom_op("kempnerforge::document_attention_backward", mutates_args=(), device_types="cpu")
def _by_document_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mixed: Tensor, log_sums: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for row, tokens in _documents(offsets, q.size(2)):
        parts = (x[row, :, tokens] for x in (grad, q, k, v, mixed, log_sums))
        for whole, part in zip(grads, _attend_backward(*parts, 0.0, True), strict=True):
            whole[row, :, tokens] = part
    return grads


@_by_document_backward.register_fake
def _(_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, offsets = inputs
    ctx.save_for_backward(q, k, v, *output, offsets)


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_by_document_backward(grad, *ctx.saved_tensors), None


_by_document.register_autograd(_gradients, setup_context=_keep)

FUSED_OPS = frozenset(
    {torch.ops.kempnerforge.document_attention.default, torch.ops.higher_order.flex_attention}
)
"""The operators of this module whose results are worth keeping for the backward pass."""
