"""Recorded faults, the breaker and suspect checkpoints, on real runs that die."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import Launcher, Run, make_run

from kempnerforge.goodput.history import AttemptHistory, read_history

pytest_plugins = ["support.run_fixtures"]

SETTINGS = {"train.max_steps": 30, "checkpoint.interval": 4, "eval.interval": 0}


def crash(how: str, call: int, rank: int) -> list[tuple[str, dict[str, object]]]:
    return [("crash_at_loss", {"how": how, "call": call, "rank": rank})]


def ends(run: Run) -> list[AttemptHistory]:
    return read_history(run.folder)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("how", "text"), [("SIGSEGV", "Segmentation fault"), ("SIGABRT", "Aborted"), ("raise", "ValueError: no")]
)
def test_fault_record_rank_1_names_rank_and_host(
    launcher: Launcher, corpus: Path, tmp_path: Path, how: str, text: str
) -> None:
    run = make_run(tmp_path, corpus, **SETTINGS)
    launcher.run(run, ranks=2, faults=crash(how, 11, 1))
    (one,) = ends(run)
    assert one.kind == "fault", one.reason
    assert one.cause is not None
    assert (one.cause.rank, text in one.cause.text) == (1, True), one.reason
    start = json.loads((run.folder / "ledger.jsonl").read_text().splitlines()[0])
    assert one.cause.host == start["hosts"][1]


def test_fault_files_killed_then_finished_run_leaves_none(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    """A killed rank counts as lost, and a finished run leaves no fault files."""
    run = make_run(tmp_path, corpus, **SETTINGS)
    launcher.run(run, ranks=2, faults=crash("SIGKILL", 11, 1))
    launcher.finish(run, ranks=2)
    assert [one.kind for one in ends(run)] == ["lost", "finished"]
    assert list((run.folder / "faults").glob("*.rank_00001.txt")) == []


def test_fault_file_unopenable_on_one_rank_ends_no_rank(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path, corpus, **SETTINGS | {"train.max_steps": 4})
    (run.folder / "faults").mkdir(parents=True)
    (run.folder / "faults/attempt_00001.rank_00001.txt").symlink_to(tmp_path / "gone/file")
    ended = launcher.finish(run, ranks=2)
    assert "the record of this attempt is not complete" in ended.outputs[1]
    assert "record of this attempt" not in ended.outputs[0]


def unblock(run: Run) -> str:
    code = "from kempnerforge.cli.app import main; main()"
    command = [sys.executable, "-c", code, "unblock", str(run.folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_breaker_foreign_causes_block_run_and_keep_step(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    """Memory, the user's code and a crash stop the loop in the end, and cost no checkpoint."""
    run = make_run(tmp_path, corpus, **SETTINGS)
    launcher.finish(run, "--train.max_steps=8")
    for how, status in [("oom", 1), ("raise", 1), ("SIGSEGV", -signal.SIGSEGV)]:
        assert launcher.run(run, faults=crash(how, 5, 0)).statuses == [status]
    assert [(row["step"], row["rejected"]) for row in run.receipts()[1:]] == [(8, [])] * 3
    refused = launcher.run(run)
    assert refused.statuses == [76], refused.output
    assert "no progress: 3 attempts" in refused.output
    for words in ("OutOfMemoryError: CUDA out of memory", "ValueError: no such luck", "Segmentation fault"):
        assert words in refused.output
    assert "Traceback" not in refused.output
    last = run.record["last_exit"]
    assert (last["status"], last["attempt"], last["step"]) == (76, 5, 8)
    assert last["reason"].startswith("no progress: 3 attempts")
    assert [one.kind for one in ends(run)] == ["finished", "fault", "fault", "fault", "blocked"]
    assert "reset the failure counter, up to attempt 5" in unblock(run)
    launcher.finish(run)
    assert run.receipts()[-1]["step"] == 8


def test_suspect_step_not_finite_twice_comes_back_by_unblock(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    """A step is suspect for a cause in the state alone, and ``unblock`` gives it its name back."""
    run = make_run(tmp_path, corpus, **SETTINGS, **{"train.max_skipped_steps": 2})
    launcher.finish(run, "--train.max_steps=8")
    not_finite = [("poison_loss", {"calls": list(range(1, 100)), "rank": 0})]
    for _ in range(2):
        ended = launcher.run(run, faults=not_finite)
        assert ended.statuses == [1], ended.output
        assert run.receipts()[-1]["step"] == 8
    assert [one.error_type for one in ends(run)] == ["", "NonFiniteError", "NonFiniteError"]
    ended = launcher.run(run, faults=crash("raise", 5, 0))
    receipt = run.receipts()[-1]
    assert receipt["step"] == 4, ended.output
    assert [(one["step"], one["outcome"]) for one in receipt["rejected"]] == [(8, "suspect")]
    assert (run.checkpoints / "suspect.step_00000008.1" / "manifest.json").exists()
    assert "6 steps after it are repeated: step 8 was committed and is set aside" in ended.output
    assert "not committed" not in ended.output
    said = unblock(run)
    assert "suspect.step_00000008.1 -> step_00000008" in said
    ended = launcher.finish(run)
    assert (run.receipts()[-1]["step"], run.receipts()[-1]["rejected"]) == (8, []), ended.output
    assert run.committed()[0] == 30
    assert not list(run.checkpoints.glob("late.*"))
