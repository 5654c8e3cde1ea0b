"""Schedule-free AdamW (arXiv:2405.15682)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kempnerforge.checkpoint.state.pieces import local_part


class ScheduleFreeAdamW(torch.optim.Optimizer):
    """AdamW that replaces the decay of the learning rate by an average of the weights.

    In training mode the parameters are y, the weights at which gradients are computed. ``eval()``
    turns them into x, the average, which is to be evaluated and exported. ``train()`` turns them
    back, up to rounding. State and groups have the names of the ``schedulefree`` package.

    State: ``z``, the weights of the underlying AdamW, and ``exp_avg_sq``. Groups: ``k`` steps done,
    ``weight_sum``, ``lr_max`` and ``train_mode``.

    Args:
        params: parameters or groups.
        lr: learning rate. Warm it up, and keep it constant afterwards.
        betas: interpolation between x and z, more than 0, and decay rate of the mean square of gradients.
        eps: added to the denominator.
        weight_decay: decoupled weight decay, computed at y.
        r: power of the step in the weights of the average.
        weight_lr_power: power of the largest learning rate so far in these weights.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "r": r}
        counters = {"k": 0, "weight_sum": 0.0, "lr_max": -1.0, "train_mode": True}
        super().__init__(params, {**defaults, "weight_lr_power": weight_lr_power, **counters})
        for group in self.param_groups:
            if not 0 < group["betas"][0] <= 1:
                raise ValueError(f"betas[0] is {group['betas'][0]}; it must be more than 0 and at most 1")

    def eval(self) -> None:
        """Turn the parameters into the evaluation weights x."""
        self._interpolate(is_training=False)

    def train(self) -> None:
        """Turn the parameters into the training weights y, up to rounding."""
        self._interpolate(is_training=True)

    @torch.no_grad()
    def _interpolate(self, *, is_training: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] == is_training:
                continue
            group["train_mode"] = is_training
            beta1 = group["betas"][0]
            for param in group["params"]:
                if "z" in self.state.get(param, {}):
                    weight = 1 - beta1 if is_training else 1 - 1 / beta1
                    local_part(param).lerp_(local_part(self.state[param]["z"]), weight)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Make one update. The optimizer must be in training mode."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("step() in evaluation mode: call train() first")
            lr, (beta1, beta2) = group["lr"], group["betas"]
            group["k"] += 1
            group["lr_max"] = max(lr, group["lr_max"])
            weight = group["k"] ** group["r"] * group["lr_max"] ** group["weight_lr_power"]
            group["weight_sum"] += weight
            share = weight / group["weight_sum"] if group["weight_sum"] else 0.0
            correction = 1 - beta2 ** group["k"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    # The weights may still have been loaded after the constructor.
                    state["z"] = torch.clone(param.detach(), memory_format=torch.preserve_format)
                    state["exp_avg_sq"] = torch.zeros_like(param)
                y, z, grad = local_part(param), local_part(state["z"]), local_part(param.grad)
                square = local_part(state["exp_avg_sq"])
                square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                direction = grad / (square / correction).sqrt_().add_(group["eps"])
                direction.add_(y, alpha=group["weight_decay"])
                y.lerp_(z, share)
                y.add_(direction, alpha=lr * (beta1 * (1 - share) - 1))
                z.sub_(direction, alpha=lr)
        return loss


PLUGIN = ScheduleFreeAdamW
