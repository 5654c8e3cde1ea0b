"""A run on a mixture is killed again and again and goes on with other ranks: all samples as without kills.

The kills fall into epochs of three sources and both sides of phase boundaries. The whole campaign has 20
kills (``-m slow``); CI has a slice of it.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from support.mixtures import mixture_run
from support.patch_target import patch_target
from support.runs import Launcher

pytest_plugins = ["support.run_fixtures"]

UPDATE = patch_target("kempnerforge.train.step:LocalStep.update")
SEED = 20261130
PHASES = ((5, {"web": 0.1, "books": 0.9}), (31, {"code": 1}), (37, {"web": 1, "books": 2, "code": 3}))


@pytest.mark.parametrize(("kills", "steps"), [(2, 12), pytest.param(20, 90, marks=pytest.mark.slow)])
def test_mixture_killed_again_and_again_draws_the_same(
    launcher: Launcher, tmp_path: Path, kills: int, steps: int
) -> None:
    settings = {"train.max_steps": steps}
    whole = mixture_run(tmp_path / "whole", settings, phases=PHASES)
    launcher.finish(whole, ranks=2)
    run = mixture_run(tmp_path / "killed", settings, phases=PHASES)
    moments = random.Random(SEED)
    for _ in range(kills):
        ranks = moments.choice((1, 2, 4))
        kill = {"target": UPDATE, "call": moments.randint(3, 6), "rank": moments.randrange(ranks)}
        ended = launcher.run(run, ranks=ranks, faults=[("kill_at_call", kill)])
        assert -9 in ended.statuses, ended.output
    launcher.finish(run, ranks=4)
    expected = {step: row["data/digest"] for step, row in whole.counting().items()}
    assert len(expected) == steps
    assert {step: row["data/digest"] for step, row in run.counting().items()} == expected
    resumes = [receipt for receipt in run.receipts() if receipt["source"] == "resume"]
    assert len(resumes) == kills
    assert {receipt["next_batch"] for receipt in resumes} == {"proved"}
