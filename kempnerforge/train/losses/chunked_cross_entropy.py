"""The cross-entropy of hidden states, some tokens at a time, as ``train.loss = "chunked_cross_entropy"``.

The logits of a chunk of tokens are computed, turned into their gradient in place, multiplied into
the gradients of hidden states and output weight, and dropped. This happens in the forward pass,
where the logits exist anyway, so that nothing is computed twice. ``recompute`` leaves the gradients
to the backward pass and computes all logits again there. Schedules whose forward passes all precede
the first backward pass need it: they would otherwise keep a gradient of the output weight for
each microbatch.

Shape suffixes: N tokens of the whole input, C tokens of a chunk, V rows of the vocabulary on this
rank, D width of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from kempnerforge.config.train import CHUNK_TOKENS
from kempnerforge.data.rows import IGNORED
from kempnerforge.train.vocab_shard import VocabShard


def chunked_cross_entropy(
    hidden_BTD: Tensor,
    targets_BT: Tensor,
    weight_VD: Tensor,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
    recompute: bool = False,
    z_loss: float = 0.0,
    row_losses: bool = False,
) -> tuple[Tensor, ...]:
    """Return the cross-entropy and the z-loss in fp32, each summed over all tokens.

    With ``row_losses`` the third result is the cross-entropy of each row, [B], without a gradient.
    Targets of ``IGNORED`` count nothing. The gradient of the first result is that of both
    together. The second result has none. Matrix products are summed in fp32. With tensor
    parallelism, ``weight_VD`` is a DTensor that is sharded by rows.

    Collective if the weight is sharded: all ranks of its mesh.
    """
    hidden_BTD, weight_VD, shard = _local(hidden_BTD, weight_VD)
    needs_gradients = torch.is_grad_enabled() and (hidden_BTD.requires_grad or weight_VD.requires_grad)
    loss, z, losses_N = _ChunkedLoss.apply(  # pyright: ignore[reportGeneralTypeIssues]
        hidden_BTD.flatten(0, -2),
        weight_VD,
        targets_BT.flatten(),
        _Options(shard, chunk_tokens, z_loss, needs_gradients, recompute),
    )
    return (loss, z, losses_N.view_as(targets_BT).sum(-1)) if row_losses else (loss, z)


chunked_cross_entropy.takes_hidden = True  # pyright: ignore[reportFunctionMemberAccess]
PLUGIN = chunked_cross_entropy


def _local(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, VocabShard]:
    """Return all hidden states and this rank's rows of the weight as plain tensors."""
    if not isinstance(weight, DTensor):
        return hidden, weight, VocabShard()
    mesh = weight.device_mesh
    if not weight.placements[0].is_shard(0):
        weight = weight.redistribute(placements=[Replicate()])
    is_sharded = weight.placements[0].is_shard(0)
    if not isinstance(hidden, DTensor):
        hidden = DTensor.from_local(hidden, mesh, [Replicate()])
    hidden = hidden.redistribute(placements=[Replicate()])
    # Every rank computes the gradient that comes from its rows. Their sum is the gradient.
    gradient = Partial() if is_sharded else Replicate()
    shard = VocabShard.of(weight, dim=0) if is_sharded else VocabShard()
    return hidden.to_local(grad_placements=[gradient]), weight.to_local(), shard


@dataclass(frozen=True)
class _Options:
    shard: VocabShard
    chunk_tokens: int
    z_loss: float
    needs_gradients: bool
    recompute: bool
    """Whether to compute the gradients in the backward pass."""

    def chunks(self, num_tokens: int) -> Iterator[slice]:
        """Yield the tokens of each chunk."""
        for start in range(0, num_tokens, self.chunk_tokens):
            yield slice(start, start + self.chunk_tokens)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradients = None
        if options.needs_gradients and not options.recompute:
            gradients = _Gradients(hidden_ND, weight_VD, ctx.needs_input_grad[:2])
        loss = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        z_loss = torch.zeros_like(loss)
        losses, log_sums = [], []
        for chunk in options.chunks(len(targets_N)):
            targets_C = targets_N[chunk]
            logits_CV = F.linear(hidden_ND[chunk], weight_VD).float()
            valid_C = targets_C != IGNORED
            highest_C = options.shard.maximum(logits_CV)
            target_C = options.shard.pick(logits_CV, targets_C) - highest_C
            exp_CV = logits_CV.sub_(highest_C[:, None]).exp_()
            sum_C = options.shard.sum(exp_CV)
            log_sum_C = sum_C.log() + highest_C
            losses.append(torch.where(valid_C, sum_C.log() - target_C, 0))
            loss += losses[-1].sum()
            if options.z_loss:
                z_loss += options.z_loss * torch.where(valid_C, log_sum_C, 0).square().sum()
            if gradients is not None:
                gradients.add(chunk, exp_CV, sum_C, log_sum_C, targets_C, options)
            log_sums.append(log_sum_C)
            del logits_CV, exp_CV  # before the logits of the next chunk are computed
        losses_N = torch.cat(losses)
        ctx.mark_non_differentiable(z_loss, losses_N)
        ctx.options, ctx.gradients = options, gradients
        if options.needs_gradients and options.recompute:
            ctx.save_for_backward(hidden_ND, weight_VD, targets_N, torch.cat(log_sums))
        return loss, z_loss, losses_N

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        options: _Options = ctx.options
        gradients: _Gradients | None = ctx.gradients
        if options.recompute:
            hidden_ND, weight_VD, targets_N, log_sum_N = ctx.saved_tensors
            gradients = _Gradients(hidden_ND, weight_VD, ctx.needs_input_grad[:2])
            for chunk in options.chunks(len(targets_N)):
                logits_CV = F.linear(hidden_ND[chunk], weight_VD).float()
                log_sum_C = log_sum_N[chunk]
                exp_CV = logits_CV.sub_(log_sum_C[:, None]).exp_()
                one_C = torch.ones_like(log_sum_C)
                gradients.add(chunk, exp_CV, one_C, log_sum_C, targets_N[chunk], options)
                del logits_CV, exp_CV
        if gradients is None:
            raise RuntimeError("chunked_cross_entropy: its gradients were used by an earlier backward()")
        ctx.gradients = None
        return *gradients.scaled(grad), None, None


class _Gradients:
    """Sums of the gradients of hidden states and weight, in fp32."""

    def __init__(self, hidden_ND: Tensor, weight_VD: Tensor, needed: tuple[bool, bool]) -> None:
        self._inputs = (hidden_ND, weight_VD)
        self._sums = [
            torch.zeros_like(given, dtype=torch.float32) if is_needed else None
            for given, is_needed in zip(self._inputs, needed, strict=True)
        ]

    def add(
        self,
        chunk: slice,
        exp_CV: Tensor,
        sum_C: Tensor,
        log_sum_C: Tensor,
        targets_C: Tensor,
        options: _Options,
    ) -> None:
        """Add the gradients of a chunk. ``exp_CV`` / ``sum_C`` are its probabilities, and overwritten."""
        valid_C = (targets_C != IGNORED).float()
        grad_CV = exp_CV.mul_((valid_C * (1 + 2 * options.z_loss * log_sum_C) / sum_C)[:, None])
        options.shard.subtract_(grad_CV, targets_C, valid_C)
        hidden_ND, weight_VD = self._inputs
        grad_CV = grad_CV if _is_fp32_product(weight_VD) else grad_CV.to(weight_VD.dtype)
        hidden_sum, weight_sum = self._sums
        if hidden_sum is not None:
            add_product_(hidden_sum[chunk], grad_CV, weight_VD)
        if weight_sum is not None:
            add_product_(weight_sum, grad_CV.T, hidden_ND[chunk])

    def scaled(self, factor: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return both, multiplied by ``factor``, in the dtypes of hidden states and weight. Only once."""
        found = [None if total is None else total.mul_(factor) for total in self._sums]
        self._sums = []
        hidden, weight = (
            None if total is None else total.to(given.dtype)
            for total, given in zip(found, self._inputs, strict=True)
        )
        return hidden, weight


def _is_fp32_product(weight: Tensor) -> bool:
    """Return whether products with ``weight`` are computed from fp32 numbers.

    Only CUDA sums products of bf16 matrices into an fp32 matrix.
    """
    return weight.dtype == torch.float32 or not weight.is_cuda


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add the product of two matrices to the fp32 matrix ``total``, without rounding it first."""
    if _is_fp32_product(right):
        total.addmm_(left, right.float())
    else:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
