"""Stop signals, stop files and deadlines in every phase of an attempt: no hang, a commit, the status."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.patch_target import patch_target
from support.runs import Attempt, Ended, Fault, Launcher, Run, make_run

from kempnerforge import fsio

pytest_plugins = ["support.run_fixtures"]

REPO = Path(__file__).parents[2]
WAIT_S, STUCK_S = 120.0, 600.0
"""What is stuck is so for longer than any test waits: an attempt that ends did not wait for it."""
SETTINGS = {"train.max_steps": 400, "checkpoint.interval": 0, "eval.interval": 0}


def wait_for(condition: Callable[[], bool], attempt: Attempt) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, attempt.output()
        time.sleep(0.005)


def stuck(tmp_path: Path, target: str, **how: Any) -> Fault:
    return ("stuck_at", {"target": target, "marker": str(tmp_path / "stuck"), "seconds": STUCK_S, **how})


def is_stuck(tmp_path: Path, *ranks: int) -> Callable[[], bool]:
    return lambda: all((tmp_path / f"stuck.{rank}").exists() for rank in ranks)


def release(tmp_path: Path) -> None:
    """Let ranks that are stuck go on."""
    (tmp_path / "stuck.release").touch()


def assert_stopped(run: Run, ended: Ended, reason: str, *, commits: bool = True) -> None:
    assert ended.statuses == [75] * len(ended.statuses), ended.output
    last_exit = run.record["last_exit"]
    assert last_exit["status"] == 75
    assert reason in last_exit["reason"]
    assert reason in ended.outputs[0]
    assert "Traceback" not in ended.output
    assert "the stacks of all its threads" not in ended.output
    if commits:
        assert run.sound()[0] == last_exit["step"] == max(row["step"] for row in run.rows())


# -- signals, in every phase -----------------------------------------------------------------------------

FORWARD = patch_target("kempnerforge.train.step:LocalStep.forward_backward")
EVALUATE = patch_target("kempnerforge.train.step:LocalStep.evaluate")
PREPARE = patch_target("kempnerforge.train.data_setup:prepare_cached")
JOIN = patch_target("kempnerforge.train.run:DistributedContext.start")
RESUME = patch_target("kempnerforge.checkpoint.manager:CheckpointManager.resume")
LAST_COMMIT = patch_target("kempnerforge.checkpoint.manager:CheckpointManager.finish")
END = patch_target("kempnerforge.train.termination.watchdog:Shutdown._end")
REPEAT_SIGNAL_AFTER_S = patch_target("kempnerforge.train.termination.signals:REPEAT_SIGNAL_AFTER_S")
EXIT_TIMEOUT_S = patch_target("kempnerforge.train.termination.watchdog:_EXIT_TIMEOUT_S")
QUERY_INTERVAL_S = patch_target("kempnerforge.slurm.deadline:QUERY_INTERVAL_S")


@pytest.mark.parametrize("rank", [0, None], ids=["to rank 0", "to all"])
def test_stop_signal_during_data_preparation_ends_it(
    launcher: Launcher, corpus: Path, tmp_path: Path, rank: int | None
) -> None:
    """Preparation may take hours: it is not waited for."""
    run = make_run(tmp_path, corpus, **SETTINGS)
    attempt = launcher.start(run, ranks=2, faults=[stuck(tmp_path, PREPARE, rank=0)])
    wait_for(is_stuck(tmp_path, 0), attempt)
    attempt.signal(signal.SIGTERM, rank=rank)
    assert_stopped(run, attempt.wait(WAIT_S), "SIGTERM", commits=False)
    assert run.committed() == []
    launcher.finish(run, "--train.max_steps=4", ranks=2)


@pytest.mark.parametrize("rank", [0, 1])
def test_stop_signal_before_rank_joins_is_not_lost(
    launcher: Launcher, corpus: Path, tmp_path: Path, rank: int
) -> None:
    run = make_run(tmp_path, corpus, **SETTINGS)
    faults = [stuck(tmp_path, JOIN, rank=rank)]
    attempt = launcher.start(run, ranks=2, faults=faults)
    wait_for(is_stuck(tmp_path, rank), attempt)
    attempt.signal(signal.SIGTERM, rank=rank)
    release(tmp_path)
    assert_stopped(run, attempt.wait(WAIT_S), "SIGTERM", commits=False)


def test_stop_signal_during_resume_trains_no_step(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, corpus, **SETTINGS)
    launcher.finish(run, "--train.max_steps=4", ranks=2)
    rows = len([row for row in run.rows() if "train/loss" in row])
    attempt = launcher.start(run, ranks=2, faults=[stuck(tmp_path, RESUME, rank=1)])
    wait_for(is_stuck(tmp_path, 1), attempt)
    attempt.signal(signal.SIGTERM, rank=1)
    release(tmp_path)
    assert_stopped(run, attempt.wait(WAIT_S), "SIGTERM")
    assert run.committed() == [4]
    assert len([row for row in run.rows() if "train/loss" in row]) == rows


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_stop_signal_to_group_during_save_spares_writers(
    launcher: Launcher, corpus: Path, tmp_path: Path, mode: str
) -> None:
    """A signal to the whole process group during a save does not end the writer processes."""
    run = make_run(tmp_path, corpus, **SETTINGS | {"checkpoint.interval": 2, "checkpoint.async_mode": mode})
    attempt = launcher.start(run, ranks=2, faults=[("slow_shards", {"seconds": 0.5, "rank": 1})])
    wait_for(lambda: bool(run.committed()), attempt)
    wait_for(lambda: bool(run.unfinished()), attempt)
    for number in (signal.SIGCONT, signal.SIGTERM, signal.SIGUSR1):
        attempt.signal(number)
    ended = attempt.wait(WAIT_S)
    assert_stopped(run, ended, "SIGTERM")
    assert "writer process died" not in ended.output
    assert run.unfinished() == []


def test_stop_signal_during_validation_commits_step(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, corpus, **SETTINGS | {"eval.interval": 3})
    attempt = launcher.start(run, ranks=2, faults=[stuck(tmp_path, EVALUATE, call=2)])
    wait_for(is_stuck(tmp_path, 0, 1), attempt)
    attempt.signal(signal.SIGHUP, rank=1)
    release(tmp_path)
    assert_stopped(run, attempt.wait(WAIT_S), "SIGHUP")
    assert run.committed() == [3]


BATCHES, MICRO_BATCHES = 100, 2
"""Of a validation, and of each batch on each rank."""
VALIDATING = {"eval.interval": 3, "eval.num_batches": BATCHES}


def slow_validation(tmp_path: Path) -> Fault:
    """The second validation takes longer than ``shutdown_timeout_s``."""
    quick = BATCHES * MICRO_BATCHES
    return ("slow_validation", {"seconds": 0.5, "quick": quick, "log": str(tmp_path / "validated")})


def validated(tmp_path: Path, rank: int) -> int:
    """Micro-batches of validations that a rank has begun."""
    path = tmp_path / f"validated.{rank}"
    return path.read_text().count("\n") if path.exists() else 0


def is_validating(tmp_path: Path) -> Callable[[], bool]:
    """Whether the second validation is under way."""
    return lambda: validated(tmp_path, 0) > BATCHES * MICRO_BATCHES


def assert_broken_off(run: Run, tmp_path: Path) -> None:
    """The second validation, of step 3, ended early, after the same batch on both ranks, and has no row."""
    assert run.committed() == [3]
    assert validated(tmp_path, 0) == validated(tmp_path, 1) < 2 * BATCHES * MICRO_BATCHES
    assert [row["step"] for row in run.rows() if "eval/loss" in row] == [0]


def test_stop_signal_breaks_long_validation_off(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "case", corpus, **SETTINGS | VALIDATING)
    attempt = launcher.start(run, ranks=2, faults=[slow_validation(tmp_path)])
    wait_for(is_validating(tmp_path), attempt)
    attempt.signal(signal.SIGTERM, rank=1)
    assert_stopped(run, attempt.wait(WAIT_S), "SIGTERM")
    assert_broken_off(run, tmp_path)


def test_last_step_is_committed_before_it_is_validated(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    more = {"train.max_steps": 3, "eval.interval": 3}
    run = make_run(tmp_path / "case", corpus, **SETTINGS | more)
    attempt = launcher.start(run, ranks=2, faults=[stuck(tmp_path, EVALUATE, call=2)])
    wait_for(is_stuck(tmp_path, 0, 1), attempt)
    assert run.sound() == [3]
    attempt.kill()
    attempt.wait(WAIT_S)


def test_stop_signal_during_last_commit_changes_nothing(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path, corpus, **SETTINGS | {"train.max_steps": 3})
    attempt = launcher.start(run, ranks=2, faults=[stuck(tmp_path, LAST_COMMIT)])
    wait_for(is_stuck(tmp_path, 0, 1), attempt)
    attempt.signal(signal.SIGTERM)
    release(tmp_path)
    ended = attempt.wait(WAIT_S)
    assert ended.statuses == [0, 0], ended.output
    assert run.sound() == [3]


@pytest.mark.parametrize("to_all", [False, True], ids=["TERM to the agent", "Ctrl-C"])
def test_stop_signal_through_torchrun_commits_step(corpus: Path, tmp_path: Path, to_all: bool) -> None:
    """Ctrl-C reaches agent and workers, and the agent passes it on as well: twice, and not meant twice."""
    run = make_run(tmp_path, corpus, **SETTINGS | {"train.max_steps": 20000})
    log = tmp_path / "log"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with log.open("wb") as file:
        agent = subprocess.Popen(
            [*torchrun, str(REPO / "scripts/train.py"), f"--config={run.config}"],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + WAIT_S
        while len(run.rows()) < 3:
            assert time.monotonic() < deadline, log.read_text()
            assert agent.poll() is None, log.read_text()
            time.sleep(0.05)
        if to_all:
            os.killpg(agent.pid, signal.SIGINT)
        else:
            agent.send_signal(signal.SIGTERM)
        agent.wait(WAIT_S)
    finally:
        agent.kill()
        agent.wait()
    last_exit = run.record["last_exit"]
    assert last_exit["status"] == 75, log.read_text()
    assert ("SIGINT" if to_all else "SIGTERM") in last_exit["reason"]
    assert run.sound() == [last_exit["step"]]
    assert not (run.folder / "stacks").exists()


# -- ended at once ---------------------------------------------------------------------------------------


def assert_ended_with_stacks(run: Run, ended: Ended, rank: int, why: str) -> None:
    stacks = (run.folder / f"stacks/attempt_1.rank_{rank:05d}.txt").read_text()
    for text in (ended.outputs[rank], stacks):
        assert why in text
        assert "fault_injection.py" in text, "the frame that the main thread is stuck in"
        assert text.count("Thread 0x") > 2


@pytest.mark.smoke
def test_stop_second_signal_ends_stuck_process_with_stacks(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    """Signals back to back are one request, and an announcement is never the second signal."""
    run = make_run(tmp_path, corpus, **SETTINGS | {"checkpoint.interval": 2})
    again_s = 1.0
    soon = ("set_value", {"target": REPEAT_SIGNAL_AFTER_S, "value": again_s})
    attempt = launcher.start(run, ranks=2, faults=[soon, stuck(tmp_path, FORWARD, call=4)])
    wait_for(is_stuck(tmp_path, 0, 1), attempt)
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):  # back to back: one request
        attempt.signal(number)
    deadline = time.monotonic() + WAIT_S
    while attempt.output().count("so this process ends now") < 2:
        assert time.monotonic() < deadline, attempt.output()
        time.sleep(again_s)  # each rank counts from when it noticed the first signal
        with contextlib.suppress(ProcessLookupError):
            attempt.signal(signal.SIGUSR1)  # an announcement is never the second signal
            attempt.signal(signal.SIGINT)
    ended = attempt.wait(WAIT_S)
    assert ended.statuses == [75, 75], ended.output
    for text in ended.outputs:
        ((name, seconds),) = re.findall(r"(SIG\w+) arrived (\S+) s after SIG", text)
        assert name == "SIGINT"
        assert float(seconds) >= again_s, "those that came back to back were one request"
    for rank in (0, 1):
        assert_ended_with_stacks(run, ended, rank, " s after SIG")
    assert "ended at once" in run.record["last_exit"]["reason"]
    assert run.sound() == [2]
    assert run.unfinished() == []
    launcher.finish(run, "--train.max_steps=6", ranks=2)
    assert run.receipts()[-1]["step"] == 2


def test_stop_past_timeout_ends_process_with_stacks(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, corpus, **SETTINGS | {"train.shutdown_timeout_s": 1.0})
    # Rank 1 is stuck and rank 0 waits for it in a collective; each of them hears of it all the same.
    # Rank 1 ends last: when it is gone, rank 0 fails in that collective.
    late = stuck(tmp_path, END, seconds=0.5, rank=1)
    attempt = launcher.start(run, ranks=2, faults=[late, stuck(tmp_path, FORWARD, call=3, rank=1)])
    wait_for(is_stuck(tmp_path, 1), attempt)
    attempt.signal(signal.SIGTERM)
    ended = attempt.wait(WAIT_S)
    assert 75 in ended.statuses, ended.output
    assert_ended_with_stacks(run, ended, 1, "not stopped 1 s after SIGTERM")
    assert "not stopped 1 s after SIGTERM" in ended.outputs[0]
    assert "Traceback" not in ended.outputs[1]


def test_stop_hanging_commit_is_abandoned_and_tears_nothing(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path, corpus, **SETTINGS | {"train.shutdown_timeout_s": 1.0, "checkpoint.interval": 2})
    frozen = ("freeze_writer", {"call": 2, "seconds": STUCK_S, "rank": 0})
    late = stuck(tmp_path, END, seconds=0.5, rank=0)  # it has the store that rank 1 reads from
    attempt = launcher.start(run, ranks=2, faults=[frozen, late])
    wait_for(lambda: run.unfinished() != [] and run.committed() == [2], attempt)
    attempt.signal(signal.SIGTERM)
    ended = attempt.wait(WAIT_S)
    assert ended.statuses == [75, 75], ended.output
    assert run.sound() == run.committed() == [2]
    launcher.finish(run, "--train.max_steps=6", ranks=2)
    assert run.receipts()[-1]["step"] == 2
    assert run.unfinished() == []


def test_stop_interpreter_lock_never_released_ends_process(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path, corpus, **SETTINGS | {"train.shutdown_timeout_s": 3.0})
    soon = ("set_value", {"target": EXIT_TIMEOUT_S, "value": 0.5})
    attempt = launcher.start(run, faults=[soon, stuck(tmp_path, FORWARD, call=3, hold_after_s=2)])
    wait_for(is_stuck(tmp_path, 0), attempt)
    attempt.signal(signal.SIGTERM)
    ended = attempt.wait(WAIT_S)
    assert ended.statuses == [1], ended.output
    assert "Timeout (0:00:03.5" in ended.output
    assert "fault_injection.py" in ended.output


# -- the stop file ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [pytest.param("preempted\nby=me\n", "preempted", marks=pytest.mark.smoke), ("", "stop.request")],
)
def test_stop_file_stops_all_ranks_and_is_removed(
    launcher: Launcher, corpus: Path, tmp_path: Path, text: str, reason: str
) -> None:
    run = make_run(tmp_path, corpus, **SETTINGS | {"train.max_steps": 20000})
    attempt = launcher.start(run, ranks=2)
    wait_for(lambda: len(run.rows()) > 2, attempt)
    fsio.atomic_write(run.folder / "stop.request", text.encode())
    assert_stopped(run, attempt.wait(WAIT_S), f"stopped by {reason}")
    assert not (run.folder / "stop.request").exists()


def test_stop_file_old_ignored_and_new_during_setup_counts(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    """A stop file of an earlier attempt is removed, and one made during set-up counts."""
    run = make_run(tmp_path, corpus, **SETTINGS | {"train.max_steps": 3})
    run.folder.mkdir()
    request = run.folder / "stop.request"
    request.write_text("preempted")
    os.utime(request, (time.time() - 60, time.time() - 60))
    launcher.finish(run, ranks=2)
    assert not request.exists()
    faults = [stuck(tmp_path, JOIN, rank=0)]
    attempt = launcher.start(run, "--train.max_steps=400", ranks=2, faults=faults)
    wait_for(is_stuck(tmp_path, 0), attempt)
    fsio.atomic_write(request, b"preempted")
    release(tmp_path)
    assert_stopped(run, attempt.wait(WAIT_S), "preempted", commits=False)
    assert not request.exists()


# -- the deadline ----------------------------------------------------------------------------------------

ENDLESS = SETTINGS | {"train.max_steps": 1_000_000, "train.deadline_margin_s": 1.0}


@pytest.mark.smoke
def test_deadline_reached_saves_in_time_and_logs_margin(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path, corpus, **ENDLESS | {"train.max_minutes": 0.08})
    assert_stopped(run, launcher.run(run, ranks=2), "deadline")
    (left_s,) = [row["deadline/margin_s"] for row in run.rows() if "deadline/margin_s" in row]
    assert left_s < 0.08 * 60
    (manifest,) = run.checkpoints.glob("step_*/manifest.json")
    assert '"stop: deadline"' in manifest.read_text()


def test_deadline_last_step_committed_is_not_saved_again(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path, corpus, **ENDLESS | {"train.max_minutes": 0.06, "checkpoint.at_steps": [1]})
    # The first step takes so long that the time is up after it.
    slow = stuck(tmp_path, FORWARD, seconds=3.5, rank=1)
    assert_stopped(run, launcher.run(run, ranks=2, faults=[slow]), "deadline")
    commits = [row["checkpoint/step"] for row in run.rows() if "checkpoint/step" in row]
    assert commits[0] == 1
    assert len(commits) == len(set(commits))


def fake_squeue(folder: Path, script: str) -> Fault:
    """A ``squeue`` first in the PATH of every rank, in a SLURM job."""
    folder.mkdir()
    (folder / "squeue").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "squeue").chmod(0o755 | stat.S_IXUSR)
    path = f"{folder}:{os.environ['PATH']}"
    return ("set_environment", {"values": {"PATH": path, "SLURM_JOB_ID": "77"}})


def job_that_ends(tmp_path: Path) -> list[Fault]:
    """A SLURM job that ends in a day, until ``move_end``."""
    script = f"test -e {tmp_path}/moved && cat {tmp_path}/moved || date -d '+1 day' +%Y-%m-%dT%H:%M:%S"
    often = ("set_value", {"target": QUERY_INTERVAL_S, "value": 0.2})
    return [fake_squeue(tmp_path / "bin", script), often]


def move_end(tmp_path: Path) -> None:
    """Have the job end three seconds from now."""
    soon = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 3))
    (tmp_path / "moved.new").write_text(soon)
    (tmp_path / "moved.new").rename(tmp_path / "moved")


def test_deadline_slurm_job_end_moved_is_noticed(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    """The end of the job is requested again and again."""
    run = make_run(tmp_path / "run", corpus, **ENDLESS)
    attempt = launcher.start(run, ranks=2, faults=job_that_ends(tmp_path))
    wait_for(lambda: len(run.rows()) > 5, attempt)
    move_end(tmp_path)
    assert_stopped(run, attempt.wait(WAIT_S), "deadline")


def test_deadline_during_long_validation_breaks_it_off(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    """No step ends while a validation lasts: nobody else looks at the time."""
    run = make_run(tmp_path / "run", corpus, **ENDLESS | VALIDATING)
    faults = [slow_validation(tmp_path), *job_that_ends(tmp_path)]
    attempt = launcher.start(run, ranks=2, faults=faults)
    wait_for(is_validating(tmp_path), attempt)
    move_end(tmp_path)
    assert_stopped(run, attempt.wait(WAIT_S), "deadline")
    assert_broken_off(run, tmp_path)


def test_deadline_squeue_failure_is_only_a_note(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", corpus, **SETTINGS | {"train.max_steps": 60})
    broken = fake_squeue(tmp_path / "bin", "echo 'slurm_load_jobs error: Unable to contact' >&2; exit 1")
    ended = launcher.run(run, ranks=2, faults=[broken])
    assert ended.statuses == [0, 0], ended.output
    assert ended.outputs[0].count("Unable to contact") == 1
    assert "deadline/margin_s" not in str(run.rows())
