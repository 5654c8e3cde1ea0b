"""The state tensors that an optimizer has for a parameter.

Those of KempnerForge's optimizers are listed here, so that a plan needs no torch. A test compares
the list with real optimizers. For any other optimizer, ``train.optimizer_probe`` finds them by a
step of a small one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from kempnerforge.config.job import JobConfig
from kempnerforge.config.optimizer_rules import group_of
from kempnerforge.plan.tensors import Parameter

Kind = Literal["parameter", "scalar", "rows", "columns"]
FP32 = 4


class StateTensor(NamedTuple):
    """One state tensor of each parameter."""

    key: str
    kind: Kind = "parameter"
    """Shape: that of the parameter, none, or with 1 as the last (rows) or last but one dimension."""
    element_bytes: int = FP32

    def shape(self, of_parameter: tuple[int, ...]) -> tuple[int, ...]:
        """Return its shape for a parameter."""
        if self.kind == "scalar":
            return ()
        if self.kind == "rows":
            return (*of_parameter[:-1], 1)
        if self.kind == "columns":
            return (*of_parameter[:-2], 1, of_parameter[-1])
        return of_parameter

    def size_bytes(self, of_parameter: tuple[int, ...]) -> int:
        """Return its size for a parameter, or for a shard of one."""
        return self.element_bytes * math.prod(self.shape(of_parameter))

    def keeps(self, dim: int, num_dims: int) -> bool:
        """Return whether it has the parameter's dimension ``dim``, so that it is sharded in it too."""
        reduced = {"rows": num_dims - 1, "columns": num_dims - 2}.get(self.kind)
        return self.kind != "scalar" and dim != reduced


class ParameterState(NamedTuple):
    """The state of one parameter."""

    tensors: tuple[StateTensor, ...]
    prefix: str = "optimizer."
    """Prefix of the names in a checkpoint."""


@dataclass(frozen=True)
class OptimizerState:
    """The state of an optimizer, or of several, by the kind of parameter."""

    hidden: ParameterState
    """Of hidden matrices, see ``train.optimizer.hidden_matrices``."""
    matrices: ParameterState
    """Of other matrices."""
    vectors: ParameterState
    """Of norms and biases."""
    problem: str = ""
    """Why the state is not known; empty if it is."""


def alike(*tensors: StateTensor) -> OptimizerState:
    """Return the state of an optimizer that has the same for all parameters."""
    state = ParameterState(tensors)
    return OptimizerState(state, state, state)


def unknown(problem: str) -> OptimizerState:
    """Return the state of an optimizer that is not known, and counts as none."""
    nothing = ParameterState(())
    return OptimizerState(nothing, nothing, nothing, problem)


STEP = StateTensor("step", "scalar")
ADAMW = (StateTensor("exp_avg"), StateTensor("exp_avg_sq"), STEP)


def _adamw(args: Mapping[str, Any]) -> OptimizerState:
    return alike(*ADAMW, *([StateTensor("max_exp_avg_sq")] if args.get("amsgrad") else []))


def _muon(_args: Mapping[str, Any]) -> OptimizerState:
    rest = ParameterState(ADAMW, "optimizers.adamw.")
    return OptimizerState(ParameterState((StateTensor("momentum_buffer"),), "optimizers.muon."), rest, rest)


def _adafactor(_args: Mapping[str, Any]) -> OptimizerState:
    matrices = ParameterState((StateTensor("row_var", "rows"), StateTensor("col_var", "columns"), STEP))
    return OptimizerState(matrices, matrices, ParameterState((StateTensor("variance"), STEP)))


def _sgd(args: Mapping[str, Any]) -> OptimizerState:
    return alike(*([StateTensor("momentum_buffer")] if args.get("momentum") else []))


BUILT_IN: dict[str, Callable[[Mapping[str, Any]], OptimizerState]] = {
    "adamw": _adamw,
    "muon": _muon,
    "lion": lambda _args: alike(StateTensor("exp_avg")),
    "schedule_free_adamw": lambda _args: alike(StateTensor("z"), StateTensor("exp_avg_sq")),
    "adafactor": _adafactor,
    "sgd": _sgd,
}
"""Name -> its state with ``optimizer.args``."""


def state_of(job: JobConfig, parameter: Parameter, probed: OptimizerState | None = None) -> ParameterState:
    """Return the state of a parameter. ``probed``: that of an optimizer that is not in ``BUILT_IN``."""
    if parameter.frozen:
        return ParameterState(())
    optimizer = job.optimizer
    index = group_of(parameter.name, optimizer.groups)
    group = optimizer.groups[index] if index is not None else None
    if optimizer.name in BUILT_IN:
        args = {**optimizer.args, **(group.args if group is not None else {})}
        state = BUILT_IN[optimizer.name](args)
    else:
        state = probed or unknown("it is not one of KempnerForge's own")
    if len(parameter.shape) < 2:
        return state.vectors
    is_hidden = parameter.is_hidden
    if group is not None and group.hidden is not None:
        is_hidden = group.hidden
    return state.hidden if is_hidden else state.matrices
