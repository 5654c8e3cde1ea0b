"""Saving over time: put off while one is written, requested from outside, and the proof after a resume."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.runs import Attempt, Launcher, Run, make_run

from kempnerforge.checkpoint.format import manifest, paths
from kempnerforge.checkpoint.run.resume_report import Receipt
from kempnerforge.goodput.event_log import read_events
from kempnerforge.train.replay_check import ReplayCheck

pytest_plugins = ["support.run_fixtures"]

LONG = {"train.max_steps": 4000, "checkpoint.interval": 0, "eval.interval": 0, "metrics.log_interval": 500}


def reasons(run: Run) -> dict[int, str]:
    return {
        step: manifest.load(run.step_folder(step)).provenance.reason
        for step in paths.committed_steps(run.checkpoints)
    }


def wait_for(condition: Callable[[], bool], attempt: Attempt) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, attempt.output()
        time.sleep(0.01)


@pytest.mark.parametrize("mode", ["async", "async_with_pinned_mem"])
def test_save_due_while_writing_is_deferred_and_counted(
    launcher: Launcher, corpus: Path, tmp_path: Path, mode: str
) -> None:
    settings = {"train.max_steps": 30, "checkpoint.interval": 2, "eval.interval": 0}
    plain = make_run(tmp_path / "plain", corpus, **settings)
    launcher.finish(plain, ranks=2)
    slow = make_run(tmp_path / "slow", corpus, **settings, **{"checkpoint.async_mode": mode})
    ended = launcher.run(slow, ranks=2, faults=[("slow_shards", {"seconds": 1.5, "rank": 1})])
    assert ended.statuses == [0, 0], ended.output
    commits = [row for row in slow.rows() if "checkpoint/step" in row]
    assert len(commits) < 15, "not every second step could be saved"
    assert max(row["checkpoint/deferred"] for row in commits) > 0
    assert max(row["checkpoint/lag_steps"] for row in commits) > 0
    assert all(row["checkpoint/blocking_s"] < row["checkpoint/total_s"] for row in commits[:-1])
    assert slow.sound()[0] == 30
    assert slow.counting() == plain.counting(), "when saves happen changes no loss"
    events = read_events(slow.folder)
    ended = [event for event in events if event["event"] == "put_off" and event["to_step"] is not None]
    waited = [event["to_step"] - event["from_step"] + 1 for event in ended]
    assert waited == [deferred for row in commits if (deferred := row["checkpoint/deferred"])]
    deleted = {step for event in events if event["event"] == "deleted" for step in event["steps"]}
    assert deleted == {row["checkpoint/step"] for row in commits} - set(slow.committed())


@pytest.mark.smoke
def test_save_requested_by_file_and_by_signal_commits(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path, corpus, **LONG, **{"checkpoint.async_mode": "async"})
    attempt = launcher.start(run, ranks=2)
    wait_for(lambda: len(run.rows()) >= 5, attempt)
    request = run.folder / "checkpoint.request"
    request.touch()
    wait_for(lambda: len(run.committed()) == 1, attempt)
    wait_for(lambda: not request.exists(), attempt)
    attempt.signal(signal.SIGUSR2, rank=1)
    wait_for(lambda: len(run.committed()) == 2, attempt)
    attempt.signal(signal.SIGTERM)
    assert attempt.wait().statuses == [75, 75]
    requested = [step for step, reason in reasons(run).items() if reason == "requested"]
    assert len(requested) == 2
    assert reasons(run)[run.committed()[0]] == "stop: SIGTERM"


@pytest.mark.smoke
def test_proof_losses_after_resume_compared_with_recorded(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "attempt": 1, "time": 0, "train/loss": 5 - step / 10} for step in range(1, 9)]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    receipt = Receipt(2, source="resume", step=5, rng="restored", lost_steps=3)
    proof = ReplayCheck.of(metrics, receipt)
    assert proof.compare(6, 5 - 0.6) is None
    assert proof.compare(7, 5 - 0.7) is None
    assert "the first 3 losses after the resume equal" in str(proof.compare(8, 5 - 0.8))
    proof = ReplayCheck.of(metrics, receipt)
    assert "warning: the loss of step 6 is 4.5 and was 4.4" in str(proof.compare(6, 4.5))
    assert proof.compare(7, 5 - 0.7) is None
    other_layout = replace(receipt, layout_changes={"num_ranks": [1, 2]})
    assert ReplayCheck.of(metrics, other_layout).compare(6, 1.0) is None, "the same bits are not promised"


def test_store_rank_ends_after_all_know_last_save(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, corpus, **{"train.max_steps": 3, "checkpoint.interval": 0, "eval.interval": 0})
    ended = launcher.run(run, ranks=2, faults=[("slow_to_learn", {"seconds": 1.5, "rank": 1})])
    assert ended.statuses == [0, 0], ended.output
