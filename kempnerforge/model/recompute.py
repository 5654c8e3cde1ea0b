"""Activation checkpointing: recompute activations in the backward instead of keeping them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kempnerforge.model.document_attention import FUSED_OPS

Recompute = Literal["none", "selective", "full"]

_aten = torch.ops.aten
SAVED_OPS = frozenset(
    {
        _aten.mm.default,
        torch.ops._c10d_functional.reduce_scatter_tensor.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        *FUSED_OPS,
    }
)
"""Operations whose outputs "selective" keeps: matrix products and fused attention, which cost the
most to recompute, and the outputs that tensor parallelism sums over ranks. (torchtitan makes the
same choice, but recomputes every second product.) Norms, rotations and activations are recomputed.
So is attention where no fused kernel applies, because its products (``bmm``) have T x T
elements."""


def recompute_activations(block: nn.Module, mode: Recompute) -> None:
    """Let the backward of ``block`` recompute activations, in place.

    Replaces ``block.forward`` instead of wrapping the module, so that parameter names do not change.
    A block with ``uses_random_numbers = False`` promises to draw none, so that their state need not
    be kept.
    """
    if mode != "none":
        keeps_state = getattr(block, "uses_random_numbers", True)
        block.forward = _recomputed(block.forward, mode, preserve_rng_state=keeps_state)


def _recomputed(
    forward: Callable[..., Any], mode: Recompute, *, preserve_rng_state: bool
) -> Callable[..., Any]:
    # "full" omits context_fn instead of passing its default, which torch.compile rejects.
    options: dict[str, Any] = {} if mode == "full" else {"context_fn": _selective_contexts}
    recompute = partial(
        checkpoint, forward, use_reentrant=False, preserve_rng_state=preserve_rng_state, **options
    )

    def run(*args: Any, **kwargs: Any) -> Any:
        return (recompute if torch.is_grad_enabled() else forward)(*args, **kwargs)

    return run


def _policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in SAVED_OPS else CheckpointPolicy.PREFER_RECOMPUTE


_selective_contexts = partial(create_selective_checkpoint_contexts, _policy)
