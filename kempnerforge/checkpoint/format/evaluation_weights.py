"""The weights to evaluate in a step of a schedule-free optimizer (arXiv:2405.15682).

Such an optimizer trains with weights y, which a step has as ``model.<name>``. The weights to
evaluate and to export are x = y + factor * (z - y), where z is state of the optimizer and factor is
1 - 1 / beta. Without torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kempnerforge.checkpoint.format import json_values

BETA: dict[str, tuple[str, int | None]] = {
    "ScheduleFreeAdamW": ("betas", 0),
    "AdamWScheduleFree": ("betas", 0),
    "RAdamScheduleFree": ("betas", 0),
    "SGDScheduleFree": ("momentum", None),
}
"""Class of an optimizer, of KempnerForge or the ``schedulefree`` package -> where a group has beta."""


@dataclass(frozen=True)
class EvaluationWeights:
    """How to compute the weights to evaluate from the tensors of a step."""

    optimizer: str = ""
    """Class of the schedule-free optimizer; empty without one."""
    z_names: Mapping[str, str] = field(default_factory=dict)
    """Parameter -> name of the tensor z in the step. The others are evaluated as they are."""
    factors: Mapping[str, float] = field(default_factory=dict)
    """Parameter -> factor."""
    unknown: str = ""
    """Class of an optimizer that has evaluation weights in a way that is not known."""


def are_others(train_state: Mapping[str, Any]) -> bool:
    """Return whether the weights to evaluate are others than those that the step has."""
    tables = [train_state.get("optimizer"), *(train_state.get("optimizers") or {}).values()]
    return any(isinstance(table, Mapping) and table.get("schedule_free") for table in tables)


def in_step(train_state: Mapping[str, Any], tensor_names: Collection[str]) -> EvaluationWeights:
    """Return how to compute them. ``train_state``: the content of ``train_state.json``."""
    tables = {"optimizer.": train_state.get("optimizer")}
    several = train_state.get("optimizers")
    if isinstance(several, Mapping):
        tables = {f"optimizers.{name}.": table for name, table in several.items()}
    found, unknown = "", ""
    z_names: dict[str, str] = {}
    factors: dict[str, float] = {}
    for prefix, table in tables.items():
        if not isinstance(table, Mapping):
            continue
        kind = table.get("class", "")
        if kind not in BETA:
            unknown = kind if table.get("schedule_free") else unknown
            continue
        found = kind
        for group in table["groups"]:
            if not group.get("train_mode", True):
                continue  # saved as evaluation weights
            for name in group["params"]:
                if (z_name := f"{prefix}state.{name}.z") in tensor_names:
                    z_names[name] = z_name
                    factors[name] = 1 - 1 / _beta(group, kind)
    return EvaluationWeights(found, z_names, factors, unknown)


def _beta(group: Mapping[str, Any], kind: str) -> float:
    key, index = BETA[kind]
    value = json_values.decode(group[key])
    return value if index is None else value[index]


def evaluation_weights(y: np.ndarray, z: np.ndarray, factor: float) -> np.ndarray:
    """Return x in fp32."""
    return y + np.float32(factor) * (z - y)
