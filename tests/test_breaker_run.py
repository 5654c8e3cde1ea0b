"""Recorded faults, the breaker and suspect checkpoints, on real runs that die."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import Launcher, Run, make_run

from kempnerforge.goodput.history import AttemptHistory, read_history

pytest_plugins = ["run_fixtures"]

SETTINGS = {"train.max_steps": 30, "checkpoint.interval": 4, "eval.interval": 0}


def crash(how: str, call: int, rank: int) -> list[tuple[str, dict[str, object]]]:
    return [("crash_at_loss", {"how": how, "call": call, "rank": rank})]


def ends(run: Run) -> list[AttemptHistory]:
    return read_history(run.folder)


@pytest.mark.parametrize(
    ("how", "text"), [("SIGSEGV", "Segmentation fault"), ("SIGABRT", "Aborted"), ("raise", "ValueError: no")]
)
def test_a_fault_on_rank_1_is_recorded_with_rank_and_host(
    launcher: Launcher, corpus: Path, tmp_path: Path, how: str, text: str
) -> None:
    run = make_run(tmp_path, corpus, **SETTINGS)
    launcher.run(run, ranks=2, sabotage=crash(how, 11, 1))
    (one,) = ends(run)
    assert one.kind == "fault", one.reason
    assert one.cause is not None
    assert (one.cause.rank, text in one.cause.text) == (1, True), one.reason
    start = json.loads((run.folder / "ledger.jsonl").read_text().splitlines()[0])
    assert one.cause.host == start["hosts"][1]


def test_a_killed_rank_is_lost_and_a_finished_run_leaves_no_fault_files(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path, corpus, **SETTINGS)
    launcher.run(run, ranks=2, sabotage=crash("SIGKILL", 11, 1))
    launcher.finish(run, ranks=2)
    assert [one.kind for one in ends(run)] == ["lost", "finished"]
    assert list((run.folder / "faults").glob("*.rank_00001.txt")) == []


def test_after_two_deaths_the_step_is_passed_over_and_after_three_the_run_refuses(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path, corpus, **SETTINGS)
    attempt = launcher.run(run, "--train.max_steps=8")
    assert attempt.statuses == [0]
    for _ in range(2):
        assert launcher.run(run, sabotage=crash("SIGSEGV", 5, 0)).statuses == [-signal.SIGSEGV]
    ended = launcher.run(run, sabotage=crash("SIGSEGV", 5, 0))
    receipt = run.receipts()[-1]
    assert receipt["step"] == 4, ended.output
    assert [(one["step"], one["outcome"]) for one in receipt["rejected"]] == [(8, "suspect")]
    assert (run.checkpoints / "suspect.step_00000008.1" / "manifest.json").exists()
    refused = launcher.run(run)
    assert refused.statuses == [76], refused.output
    assert "no progress: 3 attempts" in refused.output
    assert "Segmentation fault" in refused.output
    assert "Traceback" not in refused.output
    assert [one.kind for one in ends(run)] == ["finished", "fault", "fault", "fault", "blocked"]
    code = "from kempnerforge.cli.app import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "unblock", str(run.folder)], capture_output=True)
    assert done.returncode == 0, done.stderr
    launcher.finish(run)
    assert run.receipts()[-1]["step"] == 4


def has_told_of_steps_to_lose(run: Run, attempt: int) -> bool:
    """Whether this attempt has committed, and the ledger has a summary of steps after that."""
    own = [one for one in ends(run) if one.number == attempt and one.began_at is not None]
    if not own or not own[0].progress or not run.committed():
        return False
    return own[0].progress[-1]["step"] > max(run.committed()) > (own[0].began_at or 0)


def test_the_parts_of_a_run_that_was_killed_five_times_add_up(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path, corpus, **SETTINGS | {"train.max_steps": 20_000, "checkpoint.interval": 40})
    for number in range(1, 6):
        attempt = launcher.start(run)
        deadline = time.monotonic() + 60
        while not has_told_of_steps_to_lose(run, number):
            assert time.monotonic() < deadline, attempt.output()
            time.sleep(0.005)
        attempt.kill()
        attempt.wait()
    launcher.finish(run, f"--train.max_steps={max(run.committed()) + 10}")
    code = "from kempnerforge.cli.app import main; main()"
    command = [sys.executable, "-c", code, "report", str(run.folder)]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    body = json.loads(done.stdout)
    parts, wall_s = body["parts_s"], body["wall_s"]
    assert abs(sum(parts.values()) - wall_s) <= 0.01 * wall_s
    assert all(seconds >= -0.01 * wall_s for seconds in parts.values()), parts
    assert parts["effective"] > 0
    assert parts["lost"] > 0
    assert [one["kind"] for one in body["attempts"]] == ["lost"] * 5 + ["finished"]
    assert body["saving"]["failures"] == 5
    assert body["saving"]["daly_s"] > 0
    for one, receipt in zip(body["attempts"], run.receipts(), strict=True):
        assert one["began_at"] == receipt["step"]
    told = subprocess.run(command, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert "were effective training" in told.stdout
    print(told.stdout)
