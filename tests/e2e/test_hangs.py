"""A step or a save that takes far too long is reported while it lasts: who lags, and all stacks."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest
from support.patch_target import patch_target
from support.runs import Launcher, make_run

pytest_plugins = ["support.run_fixtures"]

ATTENTION = patch_target("kempnerforge.model.layers:Attention.forward")
FORWARD = patch_target("kempnerforge.train.step:LocalStep.forward_backward")
REARM_EVERY_S = patch_target("kempnerforge.train.hangs.detector:_REARM_EVERY_S")

SETTINGS = {
    "eval.interval": 0,
    "checkpoint.interval": 0,
    "train.hang_floor_s": 1.0,
    "train.hang_multiple": 3.0,
}


@pytest.mark.parametrize("rank", [0, 1])
def test_hang_watch_stuck_rank_is_named_while_others_wait(
    launcher: Launcher, corpus: Path, tmp_path: Path, rank: int
) -> None:
    # Steps enough after it for a look at the clock, which finds that it is over.
    run = make_run(tmp_path, corpus, **SETTINGS, **{"train.max_steps": 100})
    # Inside the model, after collectives that others have left: no phase tells the ranks apart.
    sleep = {"target": ATTENTION, "call": 30, "seconds": 5, "rank": rank, "marker": str(tmp_path / "stuck")}
    ended = launcher.run(run, ranks=2, faults=[("stuck_at", sleep)])
    assert ended.statuses == [0, 0], "it is reported, and nothing is ended"
    assert f"Rank {rank} lags: it is at step 8, forward_backward" in ended.outputs[0]
    assert "stacks/attempt_1.rank_*.txt" in ended.outputs[0]
    assert "step 8 is over" in ended.outputs[0]
    reported = ended.outputs[0].index("lags")
    assert reported < ended.outputs[0].index("step 8/100"), "while it lasts"
    for one in (0, 1):
        stacks = (run.folder / f"stacks/attempt_1.rank_{one:05d}.txt").read_text()
        assert "step 8 has lasted" in stacks
        assert ("fault_injection.py" in stacks) == (one == rank)
        assert "forward_backward" in stacks


def test_hang_watch_stuck_save_reported_while_training(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    settings = {"checkpoint.interval": 2, "checkpoint.async_mode": "async", "train.max_steps": 20000}
    run = make_run(tmp_path, corpus, **SETTINGS | settings)
    attempt = launcher.start(run, ranks=2, faults=[("freeze_writer", {"call": 3, "seconds": 5, "rank": 1})])
    deadline = time.monotonic() + 120
    while "Rank 1 lags: still at its write" not in attempt.output():
        assert time.monotonic() < deadline, attempt.output()
        time.sleep(0.05)
    attempt.signal(signal.SIGTERM)
    ended = attempt.wait()
    assert ended.statuses == [75, 75], ended.output
    assert re.search(r"saving step_\d+ has lasted .* Rank 1 lags: still at its write", ended.outputs[0])
    saves = [row for row in run.rows() if "checkpoint/step" in row]
    stuck = max(saves, key=lambda row: row["checkpoint/total_s"])
    assert stuck["checkpoint/lag_steps"] > 1, "training continued meanwhile"
    assert run.sound()[0] == run.record["last_exit"]["step"]
    for rank in (0, 1):
        stacks = (run.folder / f"stacks/attempt_1.rank_{rank:05d}.txt").read_text()
        assert re.search(r"saving step_\d+ has lasted", stacks)


def test_hang_watch_switched_off_reports_nothing(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, corpus, **SETTINGS | {"train.hang_multiple": 0.0})
    sleep = {
        "target": FORWARD,
        "call": 8,
        "seconds": 3,
        "marker": str(tmp_path / "stuck"),
    }
    ended = launcher.run(run, ranks=2, faults=[("stuck_at", sleep)])
    assert ended.statuses == [0, 0]
    assert "has lasted" not in ended.output
    assert not (run.folder / "stacks").exists()


def test_hang_watch_held_interpreter_lock_shows_stacks(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path, corpus, **SETTINGS)
    sleep = {
        "target": FORWARD,
        "call": 5,
        "seconds": 4,
        "hold_after_s": 0.0,
        "marker": str(tmp_path / "stuck"),
    }
    soon = ("set_value", {"target": REARM_EVERY_S, "value": 0.3})
    ended = launcher.run(run, faults=[soon, ("stuck_at", sleep)])
    assert ended.statuses == [0], ended.output
    assert "Timeout (0:00:01.6" in ended.output
    assert "fault_injection.py" in ended.output
