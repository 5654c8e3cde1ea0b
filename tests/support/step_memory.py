"""The device memory that a step really takes, measured on the CPU, beside what ``plan`` says of it."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.live_storages import LiveStorages
from support.tiny_model import FakeBatch
from torch import Tensor, nn

from kempnerforge.config.schema import JobConfig
from kempnerforge.plan.memory import DeviceMemory, device_memory
from kempnerforge.train.optim import build_optimizer
from kempnerforge.train.placement import build_model

CPU = torch.device("cpu")


class FusedNorm(torch.autograd.Function):
    """Keeps what CUDA's fused kernel keeps: its input and a number a row. The CPU's keeps fp32 copies."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, x.new_zeros(*x.shape[:-1], 1, dtype=torch.float32), weight)
        return x * weight

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        _, _, weight = ctx.saved_tensors
        return grad * weight, torch.zeros_like(weight)


def fused_norm_forward(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """In place of ``nn.RMSNorm.forward``."""
    return FusedNorm.apply(x, norm.weight.to(x.dtype))  # type: ignore[return-value]


def peak_and_plan(tree: dict[str, Any]) -> tuple[int, str, DeviceMemory]:
    """(most bytes alive in a step and its validation, the operation after which they were, what is planned).

    Of this rank, in the second step: by then everything that stays is there and has been seen.
    """
    gc.freeze()  # what there is already is not looked at again
    job = JobConfig.model_validate(tree)
    geometry = job.geometry(dist.get_world_size())
    with pytest.MonkeyPatch.context() as patch, LiveStorages() as live:
        patch.setattr(nn.RMSNorm, "forward", fused_norm_forward)
        placed = build_model(job, geometry, rank=dist.get_rank(), device=CPU, draw=True)
        optimizer = build_optimizer(placed.parts, job.optimizer, CPU)
        step = placed.step(optimizer, geometry, job.train)
        tokens = torch.zeros(
            (geometry.accumulation_steps, job.train.batch_size, job.train.seq_len), dtype=torch.int64
        )
        batch = FakeBatch(tokens, tokens, tokens.numel() * geometry.dp)
        for _ in range(2):
            gc.collect()
            live.reset()
            step.forward_backward(batch)
            step.update(lr=0.0)
            if job.eval.interval:
                step.evaluate([batch])
    return live.peak, live.peak_after, device_memory(job, geometry, geometry.pp_rank(dist.get_rank()))
