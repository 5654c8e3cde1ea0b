"""Compare optimizer state created at the beginning with the state that torch creates in the first step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from kempnerforge.config.schema import OptimizerConfig
from kempnerforge.train.optimizer import build_optimizer

CPU = torch.device("cpu")


def small_model() -> nn.Module:
    """Return a small model, the same at every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 6), nn.RMSNorm(6), nn.Linear(6, 3, bias=False))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    """Train a few steps on the same tokens."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        model(torch.randint(11, (5,), generator=generator)).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return this rank's part of the weights and of all optimizer state."""
    state = [optimizer.state[param][key] for param in model.parameters() for key in optimizer.state[param]]
    return [t.to_local() if isinstance(t, DTensor) else t for t in (*model.parameters(), *state)]


def compare_with_lazy_state(fused: bool, sharded: bool) -> None:
    """Train with state created at the beginning and in the first step. All bits must be the same."""
    runs: dict[str, Any] = {}
    for kind in ("eager", "lazy"):
        model = small_model()
        if sharded:
            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        optimizer = build_optimizer([model], OptimizerConfig(fused=fused), CPU)
        assert isinstance(optimizer, torch.optim.Optimizer)
        assert bool(optimizer.param_groups[0]["fused"]) == fused
        if kind == "lazy":
            optimizer.state.clear()
        layout = describe(model, optimizer)
        train(model, optimizer)
        assert len(everything(model, optimizer)) == 3 + 9
        if kind == "eager":
            assert describe(model, optimizer) == layout
        runs[kind] = describe(model, optimizer), everything(model, optimizer)
    assert runs["eager"][0] == runs["lazy"][0]
    assert all(torch.equal(a, b) for a, b in zip(runs["eager"][1], runs["lazy"][1], strict=True))
    assert {float(state["step"]) for state in optimizer.state.values()} == {3.0}


def describe(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    """Return the state tree as a checkpoint sees it: keys, types, shapes, devices, layouts."""
    return [
        (name, key, value.dtype, value.shape, value.device, getattr(value, "placements", None))
        for name, param in model.named_parameters()
        for key, value in optimizer.state[param].items()
    ]
