"""Tensor parallelism by the plan that a model brings."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import parallelize_module

from kempnerforge.errors import ConfigError, ConfigIssue


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a model, or a pipeline stage of one, over the one-dimensional ``mesh``, in place.

    The model has ``tp_plan()``, which returns a plan for torch's ``parallelize_module``. If it has
    ``after_tensor_parallel(mesh)``, that is called afterwards.

    Not collective for a model on the meta device. Raises ConfigError without a plan.
    """
    tp_plan: Any = getattr(model, "tp_plan", None)
    if not callable(tp_plan):
        problem = f"{mesh.size()} needs a plan, and {type(model).__name__} has no tp_plan()"
        raise ConfigError([ConfigIssue("distributed.tp", problem, "set tp = 1, or give the model a plan")])
    parallelize_module(model, mesh, tp_plan())  # type: ignore[arg-type]
    finish: Any = getattr(model, "after_tensor_parallel", None)
    if callable(finish):
        finish(mesh)
