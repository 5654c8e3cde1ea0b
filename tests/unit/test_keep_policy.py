"""What to keep: tables of steps, and what is true of any of them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kempnerforge.checkpoint.retention.policy import KeepPolicy, LastN, StepInfo, decide
from kempnerforge.config.schema import CheckpointConfig


def policy(**settings: Any) -> KeepPolicy:
    return KeepPolicy.from_config(CheckpointConfig.model_validate(settings))


def loss(*values: float | None, every: int = 10) -> list[StepInfo]:
    """Steps 10, 20, ... with these values of ``eval/loss``; None for one where it was not taken."""
    return [
        StepInfo(every * number, metrics={} if value is None else {"eval/loss": value, "train/loss": -value})
        for number, value in enumerate(values, 1)
    ]


def plain(*steps: int) -> list[StepInfo]:
    return [StepInfo(step) for step in steps]


def kept(facts: list[StepInfo], found: KeepPolicy) -> list[int]:
    return [verdict.step for verdict in decide(facts, found) if verdict.keep]


BEST = {"keep_last_n": 1, "best_metric": "eval/loss"}
TABLE: list[tuple[dict[str, Any], list[StepInfo], list[int]]] = [
    ({"keep_last_n": 3}, [], []),
    ({"keep_last_n": 1}, plain(5), [5]),
    ({"keep_last_n": 3}, plain(1, 2, 3), [3, 2, 1]),
    ({"keep_last_n": 3}, plain(3, 1, 2, 4), [4, 3, 2]),
    ({"keep_last_n": 1}, plain(10, 200, 30), [200]),
    # every K steps: multiples where there are, else the first one after
    ({"keep_last_n": 1, "keep_every_n_steps": 20}, plain(0, 10, 20, 30, 40, 50, 55), [55, 40, 20, 0]),
    (
        {"keep_last_n": 1, "keep_every_n_steps": 100},
        plain(30, 60, 90, 120, 150, 180, 210, 240),
        [240, 210, 120],
    ),
    ({"keep_last_n": 1, "keep_every_n_steps": 100}, plain(90, 101, 110, 201), [201, 101]),
    ({"keep_last_n": 1, "keep_every_n_steps": 1}, plain(0, 1, 2, 7), [7, 2, 1, 0]),
    # milestones
    ({"keep_last_n": 1, "keep_steps": [20, 40]}, plain(10, 20, 30, 40, 50, 60), [60, 40, 20]),
    ({"keep_last_n": 1, "keep_steps": [0]}, plain(0, 10, 20), [20, 0]),
    ({"keep_last_n": 1, "keep_steps": [20]}, plain(10, 21, 30, 40), [40, 21]),
    ({"keep_last_n": 1, "keep_steps": [20, 25]}, plain(10, 30, 40), [40, 30]),
    ({"keep_last_n": 1, "keep_steps": [50]}, plain(10, 20, 30), [30]),
    # the best of a metric
    (BEST | {"keep_best_n": 1}, loss(3.0, 1.0, 2.0, 4.0), [40, 20]),
    (BEST | {"keep_best_n": 2}, loss(3.0, 1.0, 2.0, 4.0), [40, 30, 20]),
    (BEST | {"keep_best_n": 1, "best_mode": "max"}, loss(3.0, 5.0, 2.0, 4.0), [40, 20]),
    (BEST | {"keep_best_n": 1, "best_metric": "train/loss"}, loss(3.0, 5.0, 2.0, 4.0), [40, 20]),
    (BEST | {"keep_best_n": 2}, loss(3.0, None, None, 4.0), [40, 10]),
    (BEST | {"keep_best_n": 1}, loss(None, None, None), [30]),
    (BEST | {"keep_best_n": 1}, loss(1.0, 1.0, 2.0), [30, 20]),  # of equal ones the later
    (BEST | {"keep_best_n": 9}, loss(1.0, 2.0), [20, 10]),
    # pins, readers, and steps that do not look sound
    ({"keep_last_n": 1}, [StepInfo(1, pin="pinned by a"), *plain(2, 3)], [3, 1]),
    ({"keep_last_n": 1}, [StepInfo(1), StepInfo(2, readers=("verify",)), StepInfo(3)], [3, 2]),
    ({"keep_last_n": 2}, [*plain(1, 2, 3), StepInfo(4, problem="short"), *plain(5)], [5, 4, 3]),
    ({"keep_last_n": 1}, [*plain(1, 2), StepInfo(3, problem="short")], [3, 2]),
    ({"keep_last_n": 1}, [StepInfo(1, problem="x"), StepInfo(2, problem="x")], [2, 1]),
    # a damaged step takes no milestone's and no window's place
    (
        {"keep_last_n": 1, "keep_steps": [20], "keep_every_n_steps": 20},
        [StepInfo(20, problem="short"), *plain(30, 40, 50, 60)],
        [60, 40, 30, 20],
    ),
]


@pytest.mark.parametrize(("settings", "facts", "expected"), TABLE)
def test_keep_table_matches(settings: dict[str, Any], facts: list[StepInfo], expected: list[int]) -> None:
    assert kept(facts, policy(**settings)) == expected


def test_keep_every_reason_reported() -> None:
    facts = [
        StepInfo(
            100, metrics={"eval/loss": 2.0}, pin="pinned by ann: paper", readers=("export (pid 3 on h)",)
        ),
        StepInfo(150, problem="step_00000150 is damaged: index.bin is missing"),
        StepInfo(200),
    ]
    found = policy(
        keep_last_n=2, keep_every_n_steps=100, keep_steps=[100], keep_best_n=1, best_metric="eval/loss"
    )
    verdicts = {verdict.step: verdict.reasons for verdict in decide(facts, found)}
    assert [(reason.rule, reason.text) for reason in verdicts[100]] == [
        ("last", "among the last 2"),
        ("every", "the first from 100 on, of every 100"),
        ("milestone", "milestone 100"),
        ("best", "among the best 1: eval/loss 2"),
        ("pinned", "pinned by ann: paper"),
        ("read", "being read: export (pid 3 on h)"),
    ]
    assert [reason.rule for reason in verdicts[150]] == ["problem"]
    assert [reason.rule for reason in verdicts[200]] == ["newest", "last", "every"]
    assert [rule.describe() for rule in found.rules] == [
        "the last 2",
        "one of every 100 steps",
        "milestones 100",
        "the best 1 by eval/loss (min)",
    ]


metrics = st.dictionaries(
    st.sampled_from(["eval/loss", "train/loss"]), st.floats(allow_nan=False, allow_infinity=False)
)
some_facts = st.lists(
    st.builds(
        StepInfo,
        step=st.integers(0, 60),
        metrics=metrics,
        problem=st.sampled_from(["", "", "", "short"]),
        pin=st.sampled_from(["", "", "pinned"]),
        readers=st.sampled_from([(), (), ("verify",)]),
    ),
    unique_by=lambda facts: facts.step,
    max_size=25,
)
some_policy = st.builds(
    lambda **settings: policy(**settings),
    keep_last_n=st.integers(1, 5),
    keep_every_n_steps=st.none() | st.integers(1, 30),
    keep_steps=st.lists(st.integers(0, 60), max_size=4),
    keep_best_n=st.none() | st.integers(1, 4),
    best_metric=st.sampled_from(["eval/loss", "train/loss"]),
    best_mode=st.sampled_from(["min", "max"]),
)


@given(some_facts, some_policy)
def test_keep_any_steps_invariants_satisfied(facts: list[StepInfo], found: KeepPolicy) -> None:
    verdicts = decide(facts, found)
    by_step = {one.step: one for one in facts}
    assert [verdict.step for verdict in verdicts] == sorted(by_step, reverse=True)
    assert verdicts == decide(list(reversed(facts)), found), "the order on disk does not matter"
    dropped = [by_step[verdict.step] for verdict in verdicts if not verdict.keep]
    assert not [one for one in dropped if one.problem or one.pin or one.readers]
    sound = sorted(one.step for one in facts if not one.problem)
    if sound:
        assert sound[-1] not in [one.step for one in dropped], "the newest sound step"
        kept_sound = [one.step for one in facts if not one.problem and one not in dropped]
        (last,) = (rule for rule in found.rules if isinstance(rule, LastN))
        assert set(sound[-last.count :]) <= set(kept_sound)
    left = [one for one in facts if one not in dropped]
    again = [verdict.step for verdict in decide(left, found) if not verdict.keep]
    assert again == [], "a second look drops nothing more"


@given(some_facts, some_policy, st.data())
def test_keep_restart_during_deletion_same_decision(
    facts: list[StepInfo], found: KeepPolicy, data: st.DataObject
) -> None:
    """After any part of the deletions the decision over what is left is the rest of them."""
    dropped = [verdict.step for verdict in reversed(decide(facts, found)) if not verdict.keep]
    done = dropped[: data.draw(st.integers(0, len(dropped)))]
    left = [one for one in facts if one.step not in done]
    assert [verdict.step for verdict in reversed(decide(left, found)) if not verdict.keep] == dropped[
        len(done) :
    ]


@given(some_policy, st.lists(st.integers(1, 4), min_size=1, max_size=40), st.floats(-5, 5, allow_nan=False))
def test_keep_permanent_steps_never_dropped(found: KeepPolicy, gaps: list[int], value: float) -> None:
    """Whatever is saved next, a step that the rules ``every`` and ``milestone`` keep stays kept by them."""
    on_disk: list[StepInfo] = []
    for_ever: set[int] = set()
    step = 0
    for gap in gaps:
        step += gap
        on_disk.append(StepInfo(step, metrics={"eval/loss": value + step % 7}))
        verdicts = decide(on_disk, found)
        on_disk = [one for one in on_disk if any(v.keep for v in verdicts if v.step == one.step)]
        present = {one.step for one in on_disk}
        assert for_ever <= present
        for_ever |= {
            verdict.step
            for verdict in verdicts
            if any(reason.rule in ("every", "milestone") for reason in verdict.reasons)
        }
