"""Every optimizer of a config: the same training on each layout, and as plain torch's class of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.patch_target import patch_target
from support.ranks import run_ranks
from support.tiny_model import (
    CPU,
    GLOBAL_BATCH,
    SEQ_LEN,
    TP_MODEL,
    FakeBatch,
    global_batch,
    local_step,
    sharded_model,
    whole,
)
from torch import nn

from kempnerforge.config.schema import OptimizerConfig
from kempnerforge.model.init import init_weights_
from kempnerforge.model.llama import Llama
from kempnerforge.train.optimizer import build_optimizer, each, hidden_matrices
from kempnerforge.train.optimizers import muon
from kempnerforge.train.step import LocalStep

TORCH_NADAM = patch_target("torch.optim:NAdam")
STEPS, LR = 5, 0.002
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "muon": {},
    "lion": {},
    "schedule_free_adamw": {},
    "adafactor": {},
    "sgd": {"args": {"momentum": 0.9}, "lr": 0.1},
    TORCH_NADAM: {},
}
LAYOUTS = {"1": (1, 1, 1), "fsdp2": (2, 1, 1), "tp2": (2, 1, 2), "hsdp2x2": (4, 2, 1), "fsdp2 tp2": (4, 1, 2)}
"""Name -> ranks, replicas, ranks per layer."""


def config_of(name: str, **keys: Any) -> OptimizerConfig:
    return OptimizerConfig.model_validate({"name": name, "lr": LR, **OPTIMIZERS[name], **keys})


def step_of(config: OptimizerConfig, replicate: int = 1, tp: int = 1) -> tuple[Llama, Any, LocalStep]:
    model = sharded_model(config=TP_MODEL, tp=tp, replicate=replicate)
    optimizer = build_optimizer([model], config, CPU)
    return model, optimizer, local_step(model, optimizer=optimizer, tp=tp)


def batch(number: int, tp: int = 1) -> FakeBatch:
    """This rank's sequences. The ranks of a layer have the same ones."""
    mine = global_batch(number).chunk(dist.get_world_size() // tp)[dist.get_rank() // tp][None]
    return FakeBatch(mine[..., :-1], mine[..., 1:], GLOBAL_BATCH * SEQ_LEN)


def rate(number: int, peak: float) -> float:
    return peak / (number + 1)


def train(name: str, replicate: int, tp: int) -> tuple[list[float], int, dict[str, torch.Tensor]]:
    """Losses, the number of matrices that this rank orthogonalized in a step, and the weights."""
    count = 0
    original = muon.orthogonalize

    def counted(*args: Any, **keys: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        return original(*args, **keys)

    muon.orthogonalize = counted
    config = config_of(name)
    model, _, step = step_of(config, replicate, tp)
    losses = []
    for number in range(STEPS):
        step.forward_backward(batch(number, tp))
        losses.append(step.update(rate(number, config.lr)).loss)
    return losses, count, {key: whole(param) for key, param in model.named_parameters()}


def plain(make: Callable[[Llama], list[torch.optim.Optimizer]], peak: float) -> list[float]:
    """Losses of plain torch: one process, one batch, nothing sharded."""
    with torch.device("meta"):
        model = Llama(TP_MODEL)
    model.to_empty(device="cpu")
    init_weights_(model, seed=7, init_std=TP_MODEL.init_std, n_layers=TP_MODEL.n_layers)
    optimizers, losses = make(model), []
    for number in range(STEPS):
        tokens = global_batch(number)
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate(number, peak)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def decayed(model: Llama, weight_decay: float) -> list[dict[str, Any]]:
    """Groups of matrices, and of norms without weight decay."""
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.ndim == 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0},
    ]


def torch_muon(model: Llama) -> list[torch.optim.Optimizer]:
    names = hidden_matrices([model])
    named = dict(model.named_parameters())
    hidden = [named[name] for name in named if name in names]
    rest = [
        {"params": [p for n, p in named.items() if n not in names and p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in named.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(hidden, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, betas=(0.9, 0.95), eps=1e-8),
    ]


PLAIN: dict[str, Callable[[Llama], list[torch.optim.Optimizer]]] = {
    "adamw": lambda model: [torch.optim.AdamW(decayed(model, 0.1), betas=(0.9, 0.95), eps=1e-8)],
    "muon": torch_muon,
    "adafactor": lambda model: [torch.optim.Adafactor(decayed(model, 0.0))],
    "sgd": lambda model: [torch.optim.SGD(decayed(model, 0.0), momentum=0.9)],
    TORCH_NADAM: lambda model: [torch.optim.NAdam(decayed(model, 0.0))],
}
"""What torch has a class of."""


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_on_each_layout_trains_alike(name: str) -> None:
    """One process as plain torch's class, to 1e-6, and Muon, which iterates in bf16, to 1e-5.

    Other layouts as one process, to 1e-5.
    """
    [(losses, _, weights)] = run_ranks(train, 1, name, 1, 1)
    assert len(set(losses)) == STEPS
    if name in PLAIN:
        assert losses == pytest.approx(
            plain(PLAIN[name], config_of(name).lr), rel=1e-5 if name == "muon" else 1e-6
        )
    layouts = ["fsdp2", "tp2"] if name != "adafactor" else ["fsdp2", "tp2", "fsdp2 tp2"]
    for layout in layouts:
        ranks, replicate, tp = LAYOUTS[layout]
        for found, _, found_weights in run_ranks(train, ranks, name, replicate, tp):
            assert found == pytest.approx(losses, rel=1e-5), layout
            for key, weight in found_weights.items():
                torch.testing.assert_close(weight, weights[key], rtol=1e-2, atol=LR)


@pytest.mark.parametrize("layout", [pytest.param("fsdp2", marks=pytest.mark.smoke), "hsdp2x2", "fsdp2 tp2"])
def test_muon_orthogonalizes_each_matrix_on_one_rank(layout: str) -> None:
    ranks, replicate, tp = LAYOUTS[layout]
    [(losses, on_one, _)] = run_ranks(train, 1, "muon", 1, 1)
    found = run_ranks(train, ranks, "muon", replicate, tp)
    counts = [count for _, count, _ in found]
    assert on_one == STEPS * 7 * TP_MODEL.n_layers
    assert sum(counts) == on_one
    assert max(counts) - min(counts) <= STEPS
    for row, _, _ in found:
        assert row == pytest.approx(losses, rel=1e-5)


def skip_and_train_on(name: str) -> None:
    """A step with a gradient that is not finite changes nothing."""
    model, optimizer, step = step_of(config_of(name))
    step.forward_backward(batch(0))
    step.update(LR)
    weights = copy.deepcopy({key: whole(param) for key, param in model.named_parameters()})
    state = copy.deepcopy([(one.state_dict()["state"], *_counters(one)) for one in each(optimizer)])
    step.forward_backward(batch(1))
    next(model.parameters()).grad.to_local().fill_(math.nan)  # type: ignore[union-attr]
    assert step.update(LR).skipped
    assert all(param.grad is None for param in model.parameters())
    torch.testing.assert_close(
        {key: whole(param) for key, param in model.named_parameters()}, weights, rtol=0, atol=0
    )
    now = [(one.state_dict()["state"], *_counters(one)) for one in each(optimizer)]
    torch.testing.assert_close(now, state, rtol=0, atol=0)
    step.forward_backward(batch(1))
    assert not step.update(LR).skipped


def _counters(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [
        {key: value for key, value in group.items() if isinstance(value, (int, float))}
        for group in optimizer.param_groups
    ]


def all_skip() -> None:
    for name in OPTIMIZERS:
        skip_and_train_on(name)


def test_optimizer_of_each_kind_skips_non_finite_step() -> None:
    run_ranks(all_skip, 2)


def rates_of_groups() -> list[float]:
    groups = [{"match": "wq", "lr_scale": 0.5}, {"match": "output", "lr": 3 * LR}]
    _, optimizer, step = step_of(config_of("muon", groups=groups))
    step.forward_backward(batch(0))
    step.update(LR / 4)
    return [group["lr"] / (LR / 4) for one in each(optimizer) for group in one.param_groups]


def test_groups_follow_the_schedule_at_their_own_scale() -> None:
    [scales] = run_ranks(rates_of_groups, 1)
    assert sorted(scales) == pytest.approx([0.5, 1, 1, 1, 3])


class Stopping:
    """Batches that end in an exception, as a validation that fails."""

    def __iter__(self) -> Any:
        yield batch(7)
        raise KeyboardInterrupt


def evaluate_between(tp: int) -> dict[str, Any]:
    """Train with and without validations, and validate by hand."""
    found: dict[str, Any] = {}
    for kind in ("with", "without"):
        model, optimizer, step = step_of(config_of("schedule_free_adamw"), tp=tp)
        rows, rows_of_eval = [], 0.0
        for number in range(4):
            step.forward_backward(batch(number, tp))
            rows.append(step.update(LR).loss)
            if kind == "with":
                rows_of_eval = step.evaluate([batch(7, tp)])
                with pytest.raises(KeyboardInterrupt):
                    step.evaluate(Stopping())
        found[kind] = rows, {key: whole(param) for key, param in model.named_parameters()}
        if kind == "with":
            found["evaluated"] = rows_of_eval
        else:
            optimizer.eval()
            # Not schedule-free for this: the weights are evaluated as they are.
            by_hand = local_step(model, optimizer=torch.optim.SGD(model.parameters()), tp=tp)
            found["by_hand"] = by_hand.evaluate([batch(7, tp)])
            optimizer.train()
            found["training_weights"] = by_hand.evaluate([batch(7, tp)])
    return found


@pytest.mark.smoke
def test_schedule_free_validates_average_and_changes_nothing() -> None:
    for found in run_ranks(evaluate_between, 2, 1):
        assert found["with"][0] == found["without"][0]
        torch.testing.assert_close(found["with"][1], found["without"][1], rtol=0, atol=0)
        assert found["evaluated"] == found["by_hand"]
        assert found["evaluated"] != pytest.approx(found["training_weights"], rel=1e-6)
