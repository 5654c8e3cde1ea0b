"""Parts of a run that take longer than anybody should wait for: no save, no stop and no other rank does."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.patch_target import patch_target
from support.polling import wait_until
from support.runs import Attempt, Fault, Launcher, Run, make_run

pytest_plugins = ["support.run_fixtures"]

SLOW_WRITER = Path(__file__).parents[1] / "support" / "slow_writer"
DELETE_TREE = patch_target("kempnerforge.fsio:delete_tree")
WAIT_S, STUCK_S = 120.0, 600.0
SETTINGS = {
    "train.max_steps": 1_000_000,
    "checkpoint.interval": 2,
    "checkpoint.async_mode": "async",
    "eval.interval": 0,
}


def assert_stopped(run: Run, attempt: Attempt, reason: str) -> int:
    """All ranks ended by themselves with the last finished step committed. Returns that step."""
    ended = attempt.wait(WAIT_S)
    assert ended.statuses == [75, 75], ended.output
    assert "so this process ends now" not in ended.output
    assert "Traceback" not in ended.output
    last_exit = run.record["last_exit"]
    assert reason in last_exit["reason"]
    step = max(row["step"] for row in run.rows() if "train/loss" in row)
    assert run.sound()[0] == last_exit["step"] == step, ended.output
    return step


def wait_for(condition: Callable[[], object], what: str, attempt: Attempt) -> None:
    try:
        wait_until(condition, what, timeout_s=WAIT_S)
    except AssertionError as error:
        pytest.fail(f"{error}\n{attempt.output()}")


# -- one rank's storage ----------------------------------------------------------------------------------


def slow_writer(folder: Path, *, rank: int) -> Fault:
    folder.mkdir()
    path = os.pathsep.join([str(SLOW_WRITER), *filter(None, [os.environ.get("PYTHONPATH")])])
    values = {"PYTHONPATH": path, "KEMPNERFORGE_TEST_SLOW_WRITER": str(folder)}
    return ("set_environment", {"values": values, "rank": rank})


def given_up(run: Run) -> list[int]:
    return [row["step"] for row in run.rows() if "checkpoint/error" in row]


def ended_writers(pieces: Path) -> dict[int, int]:
    """Bytes that each writer process wrote slowly before it ended, if any."""
    written = {int(path.name): path.stat().st_size for path in pieces.iterdir() if path.name != "open"}
    return {pid: size for pid, size in written.items() if size and not Path(f"/proc/{pid}").exists()}


@pytest.mark.parametrize("rank", [0, 1])
def test_save_given_up_ends_write_of_slow_rank(
    launcher: Launcher, corpus: Path, tmp_path: Path, rank: int
) -> None:
    """The storage of one rank gets slow: saves are given up, nobody stands still until they are written."""
    more = {"checkpoint.save_timeout_s": 2.0, "checkpoint.max_failed_saves": 1000}
    run = make_run(tmp_path / "case", corpus, **SETTINGS | more)
    pieces = tmp_path / "pieces"
    attempt = launcher.start(run, ranks=2, faults=[slow_writer(pieces, rank=rank)])
    wait_for(lambda: len(given_up(run)) > 1 and ended_writers(pieces), "two saves to be given up", attempt)
    cancelled, trained = ended_writers(pieces), max(row["step"] for row in run.rows() if "train/loss" in row)
    assert run.committed() == []
    assert trained > given_up(run)[0], "training went on"
    assert "training continues" in attempt.output()

    (pieces / "open").touch()
    wait_for(run.committed, "a commit", attempt)
    attempt.signal(signal.SIGTERM, rank=rank)
    assert_stopped(run, attempt, "SIGTERM")
    assert run.unfinished() == []
    (shard,) = run.step_folder(run.committed()[0]).glob(f"shard_{rank:05d}_of_*")
    assert max(cancelled.values()) < shard.stat().st_size, "written to the end"


# -- deletion of older checkpoints -----------------------------------------------------------------------


def test_deletion_that_never_ends_delays_no_save_and_no_stop(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    """Saves are blocking, so that each would wait for what comes before it."""
    blocking = {"checkpoint.async_mode": "disabled", "checkpoint.keep_last_n": 1}
    run = make_run(tmp_path / "case", corpus, **SETTINGS | blocking)
    stuck: dict[str, Any] = {"target": DELETE_TREE, "marker": str(tmp_path / "stuck"), "seconds": STUCK_S}
    attempt = launcher.start(run, ranks=2, faults=[("stuck_at", stuck | {"rank": 0})])
    wait_for((tmp_path / "stuck.0").exists, "a deletion", attempt)
    newest = run.committed()[0]
    wait_for(lambda: run.committed()[0] >= newest + 4, "two more commits", attempt)
    attempt.signal(signal.SIGTERM)
    step = assert_stopped(run, attempt, "SIGTERM")
    assert [name for name in run.unfinished() if name.endswith(".deleting")], "it was under way all the time"
    assert "was interrupted; the next start finishes it" in attempt.output()
    launcher.finish(run, f"--train.max_steps={step + 2}", ranks=2)
    assert run.receipts()[-1]["step"] == step
    assert run.committed() == [step + 2]
    assert run.unfinished() == []
