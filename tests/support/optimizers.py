"""Optimizers of all kinds, with a small model to train and a state to compare after a resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import schedulefree
import torch
from torch import nn, optim

Optimizers = torch.optim.Optimizer | dict[str, torch.optim.Optimizer]


class Lion(torch.optim.Optimizer):
    """Lion (arXiv:2302.06675), as users write it: state is created at the first gradient."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make one update."""
        for group in self.param_groups:
            first, second = group["betas"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["exp_avg"] = torch.zeros_like(param)
                update = (state["exp_avg"] * first + param.grad * (1 - first)).sign()
                param.add_(update, alpha=-group["lr"])
                state["exp_avg"].mul_(second).add_(param.grad, alpha=1 - second)


class Counting(torch.optim.Optimizer):
    """An optimizer with state of many kinds: numbers, lists, a table of tensors, and global state."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr, "seen": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make one update that depends on the whole state."""
        state = cast("dict[Any, Any]", self.state)
        everywhere = state["everywhere"]
        everywhere["calls"] = everywhere.get("calls", 0) + 1
        for group in self.param_groups:
            group["seen"] += 1
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state.update(count=0, warm=False, history=[], table={"mean": torch.zeros_like(param)})
                state["count"] += 1
                state["warm"] = state["count"] > 2
                state["table"]["mean"].mul_(0.9).add_(param.grad)
                state["history"] = [*state["history"][-2:], float(param.grad.norm())]
                scale = 1.0 + 0.01 * sum(state["history"]) / state["count"] + 0.1 * state["warm"]
                lr = group["lr"] / (group["seen"] + everywhere["calls"])
                param.sub_(state["table"]["mean"] * scale, alpha=lr)


def _muon(params: Sequence[nn.Parameter]) -> Optimizers:
    matrices = [one for one in params if one.ndim == 2]
    rest = [one for one in params if one.ndim != 2]
    return {"muon": optim.Muon(matrices, lr=0.02), "rest": optim.AdamW(rest, lr=0.01)}


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizers]] = {
    "sgd": lambda params: optim.SGD(params, lr=0.1),
    "sgd_momentum": lambda params: optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda params: optim.Adam(params, lr=0.01),
    "adam_amsgrad": lambda params: optim.Adam(params, lr=0.01, amsgrad=True),
    "adamw": lambda params: optim.AdamW(params, lr=0.01),
    "adamw_tensor_lr": lambda params: optim.AdamW(params, lr=torch.tensor(0.01), foreach=False),
    "nadam": lambda params: optim.NAdam(params, lr=0.01),
    "radam": lambda params: optim.RAdam(params, lr=0.01),
    "adagrad": lambda params: optim.Adagrad(params, lr=0.05),
    "adadelta": lambda params: optim.Adadelta(params),
    "adamax": lambda params: optim.Adamax(params, lr=0.01),
    "asgd": lambda params: optim.ASGD(params, lr=0.05),
    "rprop": lambda params: optim.Rprop(params, lr=0.01),
    "rmsprop": lambda params: optim.RMSprop(params, lr=0.01, momentum=0.5, centered=True),
    "adafactor": lambda params: optim.Adafactor(params, lr=0.05),
    "lbfgs": lambda params: optim.LBFGS(params, lr=0.1, max_iter=3),
    "muon_and_adamw": _muon,
    "lion": Lion,
    "counting": Counting,
    "schedulefree_adamw": lambda params: schedulefree.AdamWScheduleFree(params, lr=0.01, warmup_steps=3),
    "schedulefree_sgd": lambda params: schedulefree.SGDScheduleFree(params, lr=0.1),
    "schedulefree_radam": lambda params: schedulefree.RAdamScheduleFree(params, lr=0.01),
}
"""Name -> function that creates the optimizers."""
PLAIN_ONLY = {
    "rprop": "torch's does not run on DTensors",
    "adafactor": "torch's does not run on DTensors",
    "lbfgs": "its state is flat vectors of all parameters, in lists",
    "counting": "it keeps tensors in a table",
}
"""Optimizers that cannot be trained or saved with sharded parameters -> the reason."""


def each(optimizers: Optimizers) -> Iterator[torch.optim.Optimizer]:
    """Yield the one optimizer, or all of them."""
    yield from optimizers.values() if isinstance(optimizers, dict) else (optimizers,)


class Net(nn.Module):
    """Two layers, one that has gradients only from the third step on, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.late = nn.Linear(8, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.last = nn.Linear(8, 4)

    def forward(self, inputs: torch.Tensor, *, use_late: bool) -> torch.Tensor:
        """[B, 6] -> [B, 4]."""
        hidden = self.frozen(torch.tanh(self.first(inputs)))
        return self.last(hidden + self.late(hidden) if use_late else hidden)


def train_step(
    model: nn.Module, optimizers: Optimizers, step: int, *, before_update: Callable[[], None] = lambda: None
) -> float:
    """Train one step on a batch from the global generator, which a resume restores. Return the loss."""
    inputs = torch.randn(4, 6)

    def closure() -> torch.Tensor:
        for one in each(optimizers):
            one.zero_grad(set_to_none=True)
        loss = model(inputs, use_late=step >= 2).square().mean()
        loss.backward()
        return loss

    if isinstance(optimizers, optim.LBFGS):
        before_update()
        return float(optimizers.step(closure).detach())  # type: ignore[arg-type, union-attr]
    loss = closure()
    before_update()
    for one in each(optimizers):
        one.step()
    return float(loss.detach())


def make(name: str, model: nn.Module) -> Optimizers:
    """Return the optimizer of that name for all trainable parameters, in training mode."""
    made = OPTIMIZERS[name]([one for one in model.parameters() if one.requires_grad])
    for one in each(made):
        if hasattr(one, "train"):
            one.train()  # type: ignore[operator]
    return made
