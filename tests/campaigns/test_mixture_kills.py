"""A run on a mixture is killed again and again and goes on with 1 to 4 ranks: all samples as without kills.

The tokens that reached the step of each rank are compared, and the losses. The kills fall into epochs of
three sources and both sides of phase boundaries. The whole campaign has 20 kills (``-m slow``); CI has a
slice of it.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from support.mixtures import assert_trained_on_same, mixture_run, recorded, rows_by_step
from support.patch_target import patch_target
from support.runs import Launcher

pytest_plugins = ["support.run_fixtures"]

UPDATE = patch_target("kempnerforge.train.step:LocalStep.update")
SEED = 20261130
PHASES = ((5, {"web": 0.1, "books": 0.9}), (31, {"code": 1}), (37, {"web": 1, "books": 2, "code": 3}))
LAYOUTS = (1, 2, 3, 4)


@pytest.mark.parametrize(("kills", "steps"), [(2, 12), pytest.param(20, 90, marks=pytest.mark.slow)])
def test_mixture_killed_again_and_again_trains_on_the_same(
    launcher: Launcher, tmp_path: Path, kills: int, steps: int
) -> None:
    settings = {"train.max_steps": steps, "train.global_batch_size": 12}
    whole = mixture_run(tmp_path / "whole", settings, phases=PHASES)
    assert recorded(launcher, whole, ranks=2).statuses == [0, 0]
    run = mixture_run(tmp_path / "killed", settings, phases=PHASES)
    moments = random.Random(SEED)
    layouts = [3, 1, *moments.choices(LAYOUTS, k=kills - 2)]
    for ranks in layouts:
        kill = {"target": UPDATE, "call": moments.randint(3, 6), "rank": moments.randrange(ranks)}
        ended = recorded(launcher, run, ranks=ranks, faults=[("kill_at_call", kill)])
        assert -9 in ended.statuses, ended.output
    assert recorded(launcher, run, ranks=4).statuses == [0] * 4
    assert kills < len(LAYOUTS) or set(layouts) == set(LAYOUTS)

    expected = rows_by_step(whole)
    assert sorted(expected) == list(range(1, steps + 1))
    assert {len(rows) for rows in expected.values()} == {12}
    assert_trained_on_same(run, whole)
    resumes = [receipt for receipt in run.receipts() if receipt["source"] == "resume"]
    assert len(resumes) == kills
    assert {receipt["next_batch"] for receipt in resumes} == {"proved"}
