"""Lion (arXiv:2302.06675): the update is the sign of a running mean of gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kempnerforge.checkpoint.state.pieces import local_part


class Lion(torch.optim.Optimizer):
    """Lion with decoupled weight decay. Its state is one tensor per parameter, ``exp_avg``.

    Sharded parameters are updated shard by shard. The paper recommends a learning rate of a third
    to a tenth of AdamW's, and a weight decay that is larger by the same factor.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["exp_avg"] = torch.zeros_like(param)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Make one update."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                weight, grad = local_part(param), local_part(param.grad)
                mean = local_part(self.state[param]["exp_avg"])
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(mean.lerp(grad, 1 - beta1).sign_(), alpha=-group["lr"])
                mean.lerp_(grad, 1 - beta2)
        return loss


PLUGIN = Lion
