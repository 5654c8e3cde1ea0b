"""The optimizer of the model's parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from kempnerforge.checkpoint.state.optimizer_state import init_optimizer_state

if TYPE_CHECKING:
    from kempnerforge.config.schema import OptimizerConfig

FUSED_DEVICES = ("cpu", "cuda")
HYPERPARAMETERS = (
    *("name", "lr", "betas", "eps", "weight_decay", "fused"),
    *("amsgrad", "maximize", "foreach", "capturable", "differentiable", "decoupled_weight_decay"),
)
"""Keys of optimizer groups that the config sets. The checkpoint sets every other key, such as a counter."""


def parameter_groups(parts: Sequence[nn.Module]) -> dict[str, dict[str, nn.Parameter]]:
    """Return the parameters of ``parts`` by group and name.

    "decay" has the matrices. "no_decay" has the rest, the norms, whose weights need not be small.
    """
    groups: dict[str, dict[str, nn.Parameter]] = {"decay": {}, "no_decay": {}}
    for part in parts:
        for name, param in part.named_parameters():
            groups["decay" if param.ndim >= 2 else "no_decay"][name] = param
    return groups


def build_optimizer(
    parts: Sequence[nn.Module], config: OptimizerConfig, device: torch.device
) -> torch.optim.AdamW:
    """Return AdamW (arXiv:1711.05101) with ``parameter_groups``.

    State tensors are created here, not in the first step.
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
    init_optimizer_state(optimizer)
    return optimizer
