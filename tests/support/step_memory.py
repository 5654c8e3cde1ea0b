"""Measure the device memory of a step on the CPU, to compare it with the result of ``plan``."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.live_storages import LiveStorages
from support.tiny_model import FakeBatch
from torch import Tensor, nn

from kempnerforge.config.schema import JobConfig, ModelConfig, TrainConfig
from kempnerforge.model.layers import RotaryEmbedding, TransformerBlock
from kempnerforge.model.recompute import recompute_activations
from kempnerforge.plan.memory import DeviceMemory, device_memory
from kempnerforge.train.model_setup import build_model
from kempnerforge.train.optimizer import build_optimizer

CPU = torch.device("cpu")


class FusedNorm(torch.autograd.Function):
    """Keeps what CUDA's fused kernel keeps: its input and one number per row. The CPU's keeps fp32 copies."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, x.new_zeros(*x.shape[:-1], 1, dtype=torch.float32), weight)
        return x * weight

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        _, _, weight = ctx.saved_tensors
        return grad * weight, torch.zeros_like(weight)


def fused_norm_forward(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """Compute the norm in place of ``nn.RMSNorm.forward``."""
    return FusedNorm.apply(x, norm.weight.to(x.dtype))  # type: ignore[return-value]


def block_and_input(model: ModelConfig, train: TrainConfig) -> tuple[TransformerBlock, tuple[Tensor, ...]]:
    """Return a decoder layer, and its inputs for 2 sequences of 32 tokens."""
    dtype = torch.bfloat16 if train.mixed_precision == "bf16" else torch.float32
    block = TransformerBlock(model).to(dtype)
    recompute_activations(block, train.activation_checkpointing)
    x = torch.zeros(2, 32, model.dim, dtype=dtype, requires_grad=True)
    return block, (x * 1, *RotaryEmbedding(model)(32))


def kept_by_autograd(block: TransformerBlock, inputs: tuple[Tensor, ...]) -> int:
    """Return the bytes of distinct memory that the graph of a forward pass keeps, without parameters."""
    known = {one.untyped_storage().data_ptr() for one in (*block.parameters(), *inputs[1:])}
    found: dict[int, tuple[int, Tensor]] = {}

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = (storage.nbytes(), saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        block(*inputs)
    return sum(size for size, _ in found.values())


def peak_and_plan(tree: dict[str, Any]) -> tuple[int, str, DeviceMemory]:
    """Return (peak bytes of a step and its validation, the operation after which it was reached, the plan).

    All are those of this rank in the second step. By then all permanent memory exists and was seen.
    """
    gc.freeze()  # objects that already exist are not examined again
    job = JobConfig.model_validate(tree)
    geometry = job.geometry(dist.get_world_size())
    with pytest.MonkeyPatch.context() as patch, LiveStorages() as live:
        patch.setattr(nn.RMSNorm, "forward", fused_norm_forward)
        placed = build_model(job, geometry, rank=dist.get_rank(), device=CPU, init_weights=True)
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
