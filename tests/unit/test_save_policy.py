"""When to save: tables of steps, clocks and requests."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kempnerforge.checkpoint.schedule.save_policy import SavePolicy
from kempnerforge.config.schema import CheckpointConfig

MAX_STEPS = 40


def policy(**settings: Any) -> SavePolicy:
    return SavePolicy.from_config(CheckpointConfig.model_validate({"interval": 0} | settings))


def saved(found: SavePolicy, *, last: int = MAX_STEPS) -> dict[int, str]:
    """Step -> reason, for a run whose steps take 30 seconds, from step 0 to ``last``."""
    reasons, since = {}, 0.0
    for step in range(last + 1):
        reason = found.due(step, seconds_since_last_save=since)
        since = 0.0 if reason else since
        if reason:
            reasons[step] = reason
        since += 30.0
    return reasons


TABLE: list[tuple[dict[str, Any], dict[int, str]]] = [
    ({}, {}),
    ({"interval": 15}, {15: "interval", 30: "interval"}),
    ({"interval": 20}, {20: "interval", 40: "interval"}),
    ({"at_steps": [7, 3, 1000]}, {3: "listed", 7: "listed"}),
    ({"save_first": True}, {0: "first"}),
    (
        {"dyn_ckpt_window": {"stop": 16}},
        {1: "early_window", 2: "early_window", 4: "early_window", 8: "early_window", 16: "early_window"},
    ),
    ({"dyn_ckpt_window": {"start": 3, "stop": 15}}, {4: "early_window", 8: "early_window"}),
    ({"dyn_ckpt_window": {"start": 32, "stop": 64}}, {32: "early_window"}),
    (
        {"interval_minutes": 7.5},
        {15: "minutes", 30: "minutes"},
    ),
    # A save for another reason starts the minutes anew.
    (
        {"interval_minutes": 7.5, "at_steps": [10]},
        {10: "listed", 25: "minutes", 40: "minutes"},
    ),
    # The more particular reason is the one that is reported.
    (
        {"interval": 8, "at_steps": [16], "dyn_ckpt_window": {"stop": 8}},
        {
            1: "early_window",
            2: "early_window",
            4: "early_window",
            8: "early_window",
            16: "listed",
            24: "interval",
        }
        | {32: "interval", 40: "interval"},
    ),
]


@pytest.mark.parametrize(("settings", "expected"), TABLE)
def test_save_policy_table_matches(settings: dict[str, Any], expected: dict[int, str]) -> None:
    assert saved(policy(**settings)) == expected


def test_save_policy_request_due_at_once() -> None:
    found = policy(interval=5)
    assert found.due(3) is None
    assert found.due(3, requested=True) == "requested"
    assert found.due(5, requested=True) == "requested"
    assert found.due(0, requested=True) == "requested"


@pytest.mark.parametrize(("seconds", "due"), [(0.0, None), (89.9, None), (90.0, "minutes"), (1e9, "minutes")])
def test_save_policy_minutes_due_by_clock(seconds: float, due: str | None) -> None:
    found = policy(interval_minutes=1.5)
    assert found.due(7, seconds_since_last_save=seconds) == due
    assert found.due(0, seconds_since_last_save=seconds) is None, "nothing was trained yet"


@given(
    step=st.integers(0, 10**9),
    interval=st.integers(0, 1000),
    seconds=st.floats(0, 1e7),
    requested=st.booleans(),
)
def test_save_policy_ranks_always_agree(step: int, interval: int, seconds: float, requested: bool) -> None:
    one, other = (policy(interval=interval, interval_minutes=3.0) for _ in range(2))
    answers = {
        found.due(step, seconds_since_last_save=seconds, requested=requested) for found in (one, other, one)
    }
    assert len(answers) == 1
    if requested:
        assert answers == {"requested"}
