"""Parameter groups, optimizer state that is there from the start, and the learning rate of every step."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.lazy_state import CPU, compare_with_lazy_state, small_model

from kempnerforge.config.scheduler import lr_at
from kempnerforge.config.schema import OptimizerConfig, SchedulerConfig
from kempnerforge.train.optimizer import build_optimizer


def test_optim_matrices_decay_norms_do_not() -> None:
    model = small_model()
    config = OptimizerConfig(lr=0.5, weight_decay=0.2, betas=(0.8, 0.9), eps=1e-6)
    optimizer = build_optimizer([model], config, CPU)
    assert isinstance(optimizer, torch.optim.Optimizer)
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {"decay": 0.2, "no_decay": 0.0}
    assert [tuple(p.shape) for p in groups["decay"]["params"]] == [(11, 6), (3, 6)]
    assert [tuple(p.shape) for p in groups["no_decay"]["params"]] == [(6,)]
    for group in groups.values():
        assert (group["lr"], group["betas"], group["eps"], group["fused"]) == (0.5, (0.8, 0.9), 1e-6, True)


@pytest.mark.parametrize("fused", [True, False])
def test_optim_early_state_trains_as_lazy_state(fused: bool) -> None:
    compare_with_lazy_state(fused, sharded=False)


def at(step: int, max_steps: int = 100, **config: Any) -> float:
    return lr_at(step, SchedulerConfig.model_validate(config), base_lr=2.0, max_steps=max_steps)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # Warmup: ten equal steps up; the tenth is at the peak.
        ({"name": "constant", "warmup_steps": 10}, {0: 0.2, 1: 0.4, 8: 1.8, 9: 2.0, 10: 2.0, 500: 2.0}),
        ({"name": "constant"}, {0: 2.0}),
        # From 2.0 to 0.2 over 90 steps after the warmup; half way is the mean.
        ({"name": "cosine", "warmup_steps": 10}, {9: 2.0, 10: 2.0, 40: 1.55, 55: 1.1, 70: 0.65, 100: 0.2}),
        ({"name": "linear", "warmup_steps": 10}, {10: 2.0, 40: 1.4, 55: 1.1, 70: 0.8, 99: 0.22, 100: 0.2}),
        ({"name": "linear", "decay_steps": 10, "min_lr_ratio": 0.0}, {0: 2.0, 1: 1.8, 9: 0.2, 10: 0.0}),
        # Stable until the last tenth, or the last decay_steps.
        ({"name": "wsd", "warmup_steps": 10}, {5: 1.2, 10: 2.0, 90: 2.0, 95: 1.1, 100: 0.2, 900: 0.2}),
        ({"name": "wsd", "decay_steps": 40}, {0: 2.0, 60: 2.0, 80: 1.1, 100: 0.2}),
        # A decay longer than the run begins at once.
        ({"name": "wsd", "decay_steps": 400}, {0: 2.0, 200: 1.1}),
        # A run that is all warmup.
        ({"name": "cosine", "warmup_steps": 100}, {99: 2.0, 100: 0.2}),
    ],
    ids=lambda value: "-".join(str(v) for v in value.values()) if "name" in value else "",
)
def test_lr_chosen_steps_match(config: dict[str, Any], expected: dict[int, float]) -> None:
    assert {step: at(step, **config) for step in expected} == pytest.approx(expected)


configs = st.builds(
    SchedulerConfig,
    name=st.sampled_from(["cosine", "linear", "wsd", "constant"]),
    warmup_steps=st.integers(0, 30),
    decay_steps=st.none() | st.integers(1, 60),
    min_lr_ratio=st.floats(0, 1),
)


@given(config=configs, max_steps=st.integers(1, 80))
def test_lr_rises_then_falls_without_jump(config: SchedulerConfig, max_steps: int) -> None:
    rates = [lr_at(step, config, base_lr=1.0, max_steps=max_steps) for step in range(200)]
    warmup, decay = config.warmup_steps, config.resolved_decay_steps(max_steps)
    rising, falling = rates[: warmup + 1], rates[warmup:]
    assert all(b >= a for a, b in pairwise(rising)) or decay == 0
    assert all(b <= a for a, b in pairwise(falling))
    assert all(config.min_lr_ratio - 1e-12 <= rate <= 1.0 for rate in falling)
    # A cosine is steepest in its middle: pi / 2 times as steep as the straight line.
    steepest = 1.5708 * (1 - config.min_lr_ratio) / max(decay, 1) + 1e-9
    assert all(a - b <= steepest for a, b in pairwise(falling))


@given(config=configs, max_steps=st.integers(1, 80), past=st.integers(0, 10**6))
def test_lr_after_decay_stays_at_minimum(config: SchedulerConfig, max_steps: int, past: int) -> None:
    end = max(max_steps, config.warmup_steps) + config.resolved_decay_steps(max_steps)
    expected = 1.0 if config.name == "constant" else config.min_lr_ratio
    assert lr_at(end + past, config, base_lr=1.0, max_steps=max_steps) == pytest.approx(expected, abs=1e-12)
