"""The state to save, a sharded Llama with AdamW's state, and training steps of adjustable length."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from bench.machine import finish
from kempnerforge.checkpoint.state.optimizer_state import init_optimizer_state
from kempnerforge.config.schema import ModelConfig, TrainConfig
from kempnerforge.distributed.mesh import build_mesh
from kempnerforge.model.llama import Llama
from kempnerforge.parallel.shard import materialize, parallelize

STATE_BYTES = 12
"""Bytes of a parameter with AdamW's two moments, fp32."""


def model_config(size_mb: int, n_layers: int = 24) -> ModelConfig:
    """Return the config of a Llama whose fp32 weights and moments take about ``size_mb`` in total."""
    parameters = size_mb * 1e6 / STATE_BYTES
    dim = max(64, round((parameters / (12.5 * n_layers)) ** 0.5 / 64) * 64)
    shape: dict[str, Any] = {
        "dim": dim,
        "n_layers": n_layers,
        "n_heads": dim // 64,
        "vocab_size": 8192 if dim >= 512 else 512,
    }
    smaller = ModelConfig(**shape, ffn_hidden_dim=8)
    rest = parameters - smaller.num_parameters
    return ModelConfig(**shape, ffn_hidden_dim=8 + max(0, int(rest / (3 * dim * n_layers)) // 8 * 8))


def sharded_llama(config: ModelConfig, device: torch.device) -> tuple[nn.Module, torch.optim.AdamW]:
    """Return the model under FSDP2 over all ranks, and its optimizer with its state. Collective."""
    mesh = build_mesh(device.type, dp_replicate=1, dp_shard=dist.get_world_size())
    with torch.device("meta"):
        model = Llama(config)
    parallelize(model, mesh, TrainConfig())
    materialize(model, device, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    init_optimizer_state(optimizer)
    for state in optimizer.state.values():  # untouched zeros would all share one page of memory
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment].copy_(torch.rand_like(state[moment]))
    return model, optimizer


def state_bytes(model: nn.Module) -> int:
    """Return the bytes of weights and moments on all ranks."""
    return STATE_BYTES * sum(parameter.numel() for parameter in model.parameters())


class Steps:
    """Steps like those of a training loop: matrix products and a reduction over all ranks."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._device = device
        self._work = torch.rand(width, width, device=device) / width

    def forward_backward(self) -> None:
        """Do most of the work of a step."""
        for _ in range(3):
            self._work = torch.tanh(self._work @ self._work)
        dist.all_reduce(self._work[:1])

    def update(self) -> None:
        """Do the rest and wait for the device."""
        self._work = torch.tanh(self._work @ self._work)
        dist.all_reduce(self._work[:1])
        finish(self._device)
