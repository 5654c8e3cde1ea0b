"""Optimizer state that exists before the first step, so that every checkpoint has the same tree.

Asking torch for the state earlier would make the optimizer take a step, and leave its count at 1.
"""

from __future__ import annotations

import torch


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Create what the first step would create, as torch's Adam and AdamW do: zeros.

    Nothing happens where state exists already, nor for SGD without momentum, which has none. Raises TypeError
    for an optimizer whose state is unknown here; such a one must take a step before it is saved or loaded.
    """
    if optimizer.state:
        return
    if isinstance(optimizer, torch.optim.SGD) and not any(one["momentum"] for one in optimizer.param_groups):
        return
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        raise TypeError(
            f"the state of {type(optimizer).__name__} is made by its first step: take one before TrainState"
        )
    for group in optimizer.param_groups:
        on_device = bool(group["fused"] or group["capturable"])
        for param in group["params"]:
            zeros = {"exp_avg", "exp_avg_sq"} | ({"max_exp_avg_sq"} if group["amsgrad"] else set())
            optimizer.state[param] = {
                # Fused and captured kernels count on the device; the others read the count on the host.
                "step": torch.zeros((), dtype=torch.float32, device=param.device if on_device else "cpu"),
                **{
                    name: torch.zeros_like(param, memory_format=torch.preserve_format)
                    for name in sorted(zeros)
                },
            }
