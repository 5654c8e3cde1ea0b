"""``kempnerforge ckpt`` on what real training left, saved by one and by two processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.run_files import tensor_digests
from support.runs import Launcher, Run, make_run

pytest_plugins = ["support.run_fixtures"]
pytestmark = pytest.mark.smoke


def ckpt(*arguments: object, status: int = 0) -> Any:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from kempnerforge.cli.app import main; main()",
            "ckpt",
            *map(str, arguments),
            "--json",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == status, done
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def trained(launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two processes up to step 4, then one up to step 6; saved at 2, 4 and 6."""
    settings = {
        "checkpoint.interval": 2,
        "eval.interval": 2,
        "train.max_steps": 4,
        "scheduler.name": "cosine",
    }
    run = make_run(tmp_path_factory.mktemp("trained"), corpus, **settings)
    launcher.finish(run, ranks=2)
    launcher.finish(run, "--train.max_steps=6", ranks=1)
    return run


def test_ckpt_ls_verify_du_describe_real_run(trained: Run) -> None:
    listed = ckpt("ls", trained.folder)
    assert [one["step"] for one in listed["steps"]] == [6, 4, 2]
    assert [one["parent_step"] for one in listed["steps"]] == [4, 2, None]
    assert [one["attempt"] for one in listed["steps"]] == [2, 1, 1]
    assert {one["state"] for one in listed["steps"]} == {"looks sound"}
    verified = ckpt("verify", trained.folder)
    assert verified["sound"]
    assert [one["foreign"] for one in verified["steps"]] == [[], [], []]
    assert ckpt("explain", trained.folder)["policy"] == ["the last 3"]
    used = ckpt("du", trained.folder)
    for one in used["steps"]:
        kinds = one["bytes"]
        assert kinds["optimizer"] > 1.9 * kinds["model"] > 0
        assert kinds["rng"] > 0


def test_resume_longer_run_learning_rate_change_said(trained: Run) -> None:
    receipt = trained.receipts()[-1]
    before, now = receipt["learning_rate"]
    assert before < now, "a cosine to step 4 was at its end"
    logged = [row["train/lr"] for row in trained.rows() if row["step"] == 5 and "train/lr" in row]
    assert logged == [now]
    assert receipt["keeps_schedule"].startswith("scheduler.decay_steps = ")


def test_ckpt_diff_steps_of_two_layouts_compares_content(trained: Run) -> None:
    one, other = trained.step_folder(4), trained.step_folder(6)
    found = ckpt("diff", one, other)
    assert found["layout"]["num_ranks"] == [2, 1]
    assert found["config"] == {"train.max_steps": [4, 6]}
    assert found["train_state"]["step"] == [4, 6]
    assert found["tensors"]["shape_or_dtype"] == {}
    assert found["tensors"]["only_a"] == ["rng.rank_00001"]
    digests = tensor_digests(one), tensor_digests(other)
    both = digests[0].keys() & digests[1].keys()
    differing = sorted(name for name in both if digests[0][name] != digests[1][name])
    assert found["tensors"]["content"] == differing
    assert len(differing) > 10
    assert found["tensors"]["equal"] == len(both) - len(differing)


def test_ckpt_inspect_tensors_match_step(trained: Run) -> None:
    found = ckpt("inspect", trained.checkpoints / "latest")
    assert found["step"] == 6
    assert found["tensors"].keys() == tensor_digests(trained.step_folder(6)).keys()
    assert found["train_state"]["step"] == 6
    assert found["config"]["train"]["max_steps"] == 6
