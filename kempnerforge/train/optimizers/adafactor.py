"""Adafactor (arXiv:1804.04235): the second moment of a matrix is stored as a row and a column."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from kempnerforge.checkpoint.state.optimizer_layout import zeros_of_shape
from kempnerforge.checkpoint.state.pieces import local_part
from kempnerforge.torch_compat import StridedShard


class Adafactor(torch.optim.Optimizer):
    """``torch.optim.Adafactor`` for whole parameters and, unlike torch's, for sharded ones.

    State and arithmetic are torch's. ``eps1`` and ``eps2`` are the two numbers of its ``eps``.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        beta2_decay: float = -0.8,
        eps1: float | None = None,
        eps2: float = 1e-3,
        d: float = 1.0,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "beta2_decay": beta2_decay, "eps1": eps1, "eps2": eps2, "d": d}
        super().__init__(params, {**defaults, "weight_decay": weight_decay})
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param] = _initial_state(param)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Make one update. Collective: all ranks of the parameters' meshes."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    _update(param, self.state[param], group)
        return loss


def _initial_state(param: Tensor) -> dict[str, Tensor]:
    state = {"step": torch.zeros((), dtype=torch.float32, device="cpu")}
    if param.ndim < 2:
        return {**state, "variance": torch.zeros_like(param)}
    shape = tuple(param.shape)
    state["row_var"] = zeros_of_shape(param, (*shape[:-1], 1))
    state["col_var"] = zeros_of_shape(param, (*shape[:-2], 1, shape[-1]))
    return state


def _update(param: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    state["step"] += 1
    step = state["step"].item()
    assert param.grad is not None
    weight, grad = local_part(param), local_part(param.grad)
    eps1 = torch.finfo(param.dtype).eps if group["eps1"] is None else group["eps1"]
    new_share = step ** group["beta2_decay"]
    size = max(param.numel(), 1) ** 0.5
    rms = _sum_over_ranks(weight.square().sum(), param).sqrt() / size
    alpha = rms.clamp(min=group["eps2"]) * min(group["lr"], step**-0.5)
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    if param.ndim < 2:
        variance = local_part(state["variance"]).lerp_(grad.square(), new_share).clone()
    else:
        row, column = local_part(state["row_var"]), local_part(state["col_var"])
        row.lerp_(_mean(grad.square(), -1, param), new_share)
        column.lerp_(_mean(grad.square(), -2, param), new_share)
        variance = row @ column / _mean(row, -2, param).clamp(min=eps1)
    update = variance.clamp_(min=eps1 * eps1).rsqrt_().mul_(grad)
    norm = _sum_over_ranks(update.square().sum(), param).sqrt()
    weight.sub_(update.mul_(alpha / (norm / (size * group["d"])).clamp(min=1.0)))


def _mean(values: Tensor, dim: int, param: Tensor) -> Tensor:
    """Return the mean over a dimension of the whole parameter, of which ``values`` are this rank's."""
    if param.size(dim) == 1:
        return values  # a rank may have an empty shard of it
    return _sum_over_ranks(values.sum(dim, keepdim=True), param, dim % param.ndim) / param.size(dim)


def _sum_over_ranks(value: Tensor, param: Tensor, dim: int | None = None) -> Tensor:
    """Sum over the ranks among which the parameter is sharded, in ``dim`` or in any dimension."""
    if isinstance(param, DTensor):
        for mesh_dim, placement in enumerate(param.placements):
            is_sharded = isinstance(placement, (Shard, StridedShard)) and dim in (None, placement.dim)
            if is_sharded and param.device_mesh.size(mesh_dim) > 1:
                dist.all_reduce(value, group=param.device_mesh.get_group(mesh_dim))
    return value


PLUGIN = Adafactor
