"""Find the state tensors of any optimizer by a step of a small one, for ``kempnerforge plan``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from kempnerforge.errors import ConfigError
from kempnerforge.plan.optimizer_state import (
    Kind,
    OptimizerState,
    ParameterState,
    StateTensor,
    unknown,
)
from kempnerforge.train.optimizer import build_optimizer, each

if TYPE_CHECKING:
    from kempnerforge.config.schema import OptimizerConfig


def probe(config: OptimizerConfig) -> OptimizerState:
    """Return the state tensors of the optimizer of the config, or why they are not known."""
    embedding, layer = nn.Embedding(11, 7), nn.Linear(7, 5)
    model = nn.Sequential(embedding, layer, nn.Linear(5, 11, bias=False))
    parameters = {"hidden": layer.weight, "matrices": embedding.weight, "vectors": layer.bias}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.1)
    try:
        made = build_optimizer([model], config.model_copy(update={"groups": []}), torch.device("cpu"))
        for optimizer in each(made):
            optimizer.step()
    except ConfigError as error:
        return unknown("; ".join(f"{issue.key}: {issue.problem}" for issue in error.faults))
    except Exception as error:  # noqa: BLE001 - a plan must not end because of an optimizer
        return unknown(f"its step raised {type(error).__name__}: {error}")
    by_prefix = {"optimizer.": made} if isinstance(made, torch.optim.Optimizer) else {}
    if isinstance(made, dict):
        by_prefix = {f"optimizers.{name}.": optimizer for name, optimizer in made.items()}
    found = {key: ParameterState(()) for key in parameters}
    for kind, parameter in parameters.items():
        for prefix, optimizer in by_prefix.items():
            if not any(parameter is p for group in optimizer.param_groups for p in group["params"]):
                continue
            tensors: list[StateTensor] = []
            for key, value in optimizer.state.get(parameter, {}).items():
                if not isinstance(value, torch.Tensor):
                    continue
                if (shape := _kind(value, parameter)) is None:
                    return unknown(f"its {key} has shape {tuple(value.shape)}")
                tensors.append(StateTensor(key, shape, value.element_size()))
            found[kind] = ParameterState(tuple(tensors), prefix)
    return OptimizerState(found["hidden"], found["matrices"], found["vectors"])


def _kind(value: torch.Tensor, parameter: torch.Tensor) -> Kind | None:
    shape, whole = tuple(value.shape), tuple(parameter.shape)
    kinds: dict[tuple[int, ...], Kind] = {whole: "parameter", (): "scalar"}
    if len(whole) > 1:
        kinds |= {(*whole[:-1], 1): "rows", (*whole[:-2], 1, whole[-1]): "columns"}
    return kinds.get(shape)
