"""A tiny model and artificial batches for tests of sharding and of the training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from kempnerforge.config.schema import ModelConfig, OptimizerConfig, TrainConfig
from kempnerforge.distributed.mesh import build_mesh
from kempnerforge.model.llama import Llama
from kempnerforge.parallel.shard import materialize, parallelize
from kempnerforge.train.optimizer import Optimizers, build_optimizer
from kempnerforge.train.step import LocalStep

CPU = torch.device("cpu")
MODEL = ModelConfig(
    dim=36,
    n_layers=2,
    n_heads=3,
    n_kv_heads=1,
    head_dim=2,
    ffn_hidden_dim=50,
    vocab_size=67,
    max_seq_len=16,
    init_std=0.2,
)
"""Shards over 4 ranks are uneven, and two ranks hold no part of the key and value weights."""
TP_MODEL = ModelConfig(
    dim=24,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    ffn_hidden_dim=50,
    vocab_size=67,
    max_seq_len=16,
    init_std=0.2,
)
"""67 rows are uneven over two ranks, and again over two shards of each."""
GLOBAL_BATCH, SEQ_LEN = 8, 12


@dataclass(frozen=True)
class FakeBatch:
    """One rank's part of a global batch."""

    inputs_ABT: Tensor
    targets_ABT: Tensor
    num_tokens: int | None
    document_ids_ABT: Tensor | None = None
    sources_AB: Tensor | None = None


def global_batch(step: int) -> Tensor:
    """Return the same token ids on every rank, int64 [GLOBAL_BATCH, SEQ_LEN + 1]."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(MODEL.vocab_size, (GLOBAL_BATCH, SEQ_LEN + 1), generator=generator)


def batch_of_rank(step: int, accumulation: int) -> FakeBatch:
    """Return this rank's sequences of the global batch, in ``accumulation`` micro-batches."""
    mine = global_batch(step).chunk(dist.get_world_size())[dist.get_rank()]
    mine_ABT = mine.view(accumulation, -1, SEQ_LEN + 1)
    return FakeBatch(mine_ABT[..., :-1], mine_ABT[..., 1:], GLOBAL_BATCH * SEQ_LEN)


def train_config(**changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({"mixed_precision": "fp32"} | changes)


def sharded_model(
    train: TrainConfig | None = None,
    *,
    replicate: int = 1,
    tp: int = 1,
    config: ModelConfig = MODEL,
    seed: int = 7,
) -> Llama:
    """Return a model sharded over all ranks, with ``replicate`` replicas and ``tp`` ranks per layer."""
    shard = dist.get_world_size() // replicate // tp
    mesh = build_mesh("cpu", dp_replicate=replicate, dp_shard=shard, tp=tp)
    with torch.device("meta"):
        model = Llama(config)
    parallelize(model, mesh, train or train_config())
    materialize(model, CPU, seed=seed)
    return model


def adamw(model: Llama) -> torch.optim.Optimizer:
    optimizer = build_optimizer([model], OptimizerConfig(lr=0.01), CPU)
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer


def local_step(
    model: Llama,
    *,
    optimizer: Optimizers | None = None,
    grad_clip_norm: float = 1.0,
    tp: int = 1,
) -> LocalStep:
    optimizer = optimizer or adamw(model)
    world = dist.group.WORLD
    assert world is not None
    return LocalStep(model, optimizer, device=CPU, group=world, grad_clip_norm=grad_clip_norm, loss_copies=tp)


def whole(tensor: Tensor) -> Tensor:
    """Return a copy of the whole tensor, on every rank."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def losses_of(options: dict[str, Any], config: ModelConfig = MODEL) -> list[tuple[float, float]]:
    """Return (loss, gradient norm) of three steps under training ``options``, then (validation loss, 0)."""
    step = local_step(sharded_model(train_config(**options), config=config))
    rows = []
    for i in range(3):
        step.forward_backward(batch_of_rank(i, 2))
        result = step.update(lr=0.01)
        rows.append((result.loss, result.grad_norm))
    rows.append((step.evaluate([batch_of_rank(9, 1)]), 0.0))
    return rows
