"""The z-loss of whole logits (PaLM, arXiv:2204.02311, section 5): it keeps log Z of the softmax near 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from kempnerforge.data.rows import IGNORED
from kempnerforge.train.vocab_shard import VocabShard


def z_loss(logits_BTV: Tensor, targets_BT: Tensor, coefficient: float) -> Tensor:
    """Return ``coefficient`` x log(Z)^2 in fp32, summed over all tokens whose target is not ignored.

    Logits that are sharded over the vocabulary remain sharded.

    Collective if they are: all ranks of their mesh.
    """
    shard = VocabShard()
    if isinstance(logits_BTV, DTensor):
        if not logits_BTV.placements[0].is_shard(logits_BTV.ndim - 1):
            logits_BTV = logits_BTV.redistribute(placements=[Replicate()])
        else:
            shard = VocabShard.of(logits_BTV, dim=logits_BTV.ndim - 1)
        logits_BTV = logits_BTV.to_local()
    valid_N = targets_BT.flatten() != IGNORED
    return _ZLoss.apply(logits_BTV.flatten(0, -2), valid_N, coefficient, shard)  # pyright: ignore[reportReturnType]


class _ZLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits_NV: Tensor, valid_N: Tensor, coefficient: float, shard: VocabShard
    ) -> Tensor:
        highest_N = shard.maximum(logits_NV).float()
        sum_N = shard.sum((logits_NV - highest_N[:, None]).exp_())
        log_sum_N = sum_N.log() + highest_N
        ctx.coefficient = coefficient
        ctx.save_for_backward(logits_NV, log_sum_N, valid_N)
        return coefficient * torch.where(valid_N, log_sum_N, 0).square().sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        logits_NV, log_sum_N, valid_N = ctx.saved_tensors
        factor_N = torch.where(valid_N, 2 * ctx.coefficient * log_sum_N, 0) * grad
        grad_NV = (logits_NV - log_sum_N[:, None]).exp_().mul_(factor_N[:, None])
        return grad_NV.to(logits_NV.dtype), None, None, None
