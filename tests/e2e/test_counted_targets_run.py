"""Runs on data of which not all targets count: what they log, that they resume bitwise, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.patch_target import patch_target
from support.runs import Launcher, make_run

pytest_plugins = ["support.run_fixtures"]

UPDATE = patch_target("kempnerforge.train.step:LocalStep.update")
EVERY_FOURTH = ("ignore_targets", {"keep_every": 4})
NONE = ("ignore_targets", {"keep_every": 0})


def test_run_with_ignored_targets_resumes_bitwise(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    undisturbed = make_run(tmp_path / "undisturbed", corpus, **{"train.max_steps": 8})
    assert launcher.run(undisturbed, ranks=2, faults=[EVERY_FOURTH]).statuses == [0, 0]
    killed = make_run(tmp_path / "killed", corpus, **{"train.max_steps": 8})
    faults = [EVERY_FOURTH, ("kill_at_call", {"target": UPDATE, "call": 7})]
    assert -9 in launcher.run(killed, ranks=2, faults=faults).statuses
    assert launcher.run(killed, ranks=2, faults=[EVERY_FOURTH]).statuses == [0, 0]
    assert killed.counting() == undisturbed.counting()
    rows = [row for row in undisturbed.rows() if "train/loss" in row]
    assert [row["train/tokens"] for row in rows] == [4 * 32 // 4 * row["step"] for row in rows]
    for row in rows:
        assert row["train/tokens_per_s"] == pytest.approx(32 / row["time/step_s"])


@pytest.mark.parametrize(
    ("interval", "problem"),
    [
        (4, "nothing counts in the first eval.num_batches = 2 batches of the validation split"),
        (0, "3 steps in a row were skipped, up to step 3, the last because nothing in its batch counts"),
    ],
)
def test_run_without_counted_targets_exits_2(
    launcher: Launcher, corpus: Path, tmp_path: Path, interval: int, problem: str
) -> None:
    run = make_run(tmp_path, corpus, **{"eval.interval": interval, "train.max_skipped_steps": 3})
    ended = launcher.run(run, ranks=2, faults=[NONE])
    assert ended.statuses == [2, 2], ended.output
    assert ended.output.count(problem) == 1
