"""The optimizer and the learning rate of every step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from kempnerforge.checkpoint.optimizer_state import make_state

if TYPE_CHECKING:
    from kempnerforge.config.schema import OptimizerConfig, SchedulerConfig

FUSED_DEVICES = ("cpu", "cuda")
HYPERPARAMETERS = (
    *("name", "lr", "betas", "eps", "weight_decay", "fused"),
    *("amsgrad", "maximize", "foreach", "capturable", "differentiable", "decoupled_weight_decay"),
)
"""Keys of optimizer groups that are the config's. Every other key, a counter say, is the checkpoint's."""


def parameter_groups(parts: Sequence[nn.Module]) -> dict[str, dict[str, nn.Parameter]]:
    """The parameters of ``parts`` by group and name.

    "decay" has the matrices; "no_decay" has the rest, the norms, whose weights have no reason to be small.
    """
    groups: dict[str, dict[str, nn.Parameter]] = {"decay": {}, "no_decay": {}}
    for part in parts:
        for name, param in part.named_parameters():
            groups["decay" if param.ndim >= 2 else "no_decay"][name] = param
    return groups


def build_optimizer(
    parts: Sequence[nn.Module], config: OptimizerConfig, device: torch.device
) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) with ``parameter_groups``, and its state there from the start.

    State tensors are created here and not in the first step.
    """
    groups = parameter_groups(parts)
    fused = config.fused and device.type in FUSED_DEVICES
    optimizer = torch.optim.AdamW(
        [
            {"name": "decay", "params": [*groups["decay"].values()], "weight_decay": config.weight_decay},
            {"name": "no_decay", "params": [*groups["no_decay"].values()], "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True if fused else None,
    )
    make_state(optimizer)
    return optimizer


def lr_at(step: int, config: SchedulerConfig, *, base_lr: float, max_steps: int) -> float:
    """Learning rate of the update that turns ``step`` into ``step + 1``.

    A linear warmup that reaches ``base_lr`` in its last step, then the schedule's shape down to
    ``min_lr_ratio * base_lr``: over the ``decay_steps`` after the warmup for cosine (arXiv:1608.03983) and
    linear, over the last ``decay_steps`` of the run, linearly, for WSD (arXiv:2404.06395). After the decay it
    stays at the minimum.
    """
    if step < config.warmup_steps:
        return base_lr * (step + 1) / config.warmup_steps
    if config.name == "constant":
        return base_lr
    decay_steps = config.resolved_decay_steps(max_steps)
    start = config.warmup_steps
    if config.name == "wsd":
        start = max(start, max_steps - decay_steps)
    progress = min(1.0, (step - start) / decay_steps) if decay_steps else 1.0
    if config.name == "cosine":
        remaining = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        remaining = 1 - max(0.0, progress)
    return base_lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * remaining)
