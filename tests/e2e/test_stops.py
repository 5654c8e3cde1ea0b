"""What ends a run early: a signal, a dead rank, losses that are not finite, failed saves. No rank hangs."""

from __future__ import annotations

import errno
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.run_files import tensor_digests
from support.runs import Attempt, Ended, Launcher, Run, make_run
from support.tmpfs import mounted_tmpfs

pytest_plugins = ["support.run_fixtures"]

STEPS = 40
WAIT_S = 120.0
SETTINGS = {"train.max_steps": STEPS, "checkpoint.interval": 0, "eval.interval": 10}


@pytest.fixture(scope="module")
def uninterrupted(launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two ranks that trained all steps without a stop."""
    run = make_run(tmp_path_factory.mktemp("uninterrupted"), corpus, **SETTINGS)
    launcher.finish(run, ranks=2)
    return run


def wait_for(condition: Callable[[], bool], attempt: Attempt) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, attempt.output()
        time.sleep(0.005)


def assert_resumes_bitwise(launcher: Launcher, run: Run, uninterrupted: Run, step: int) -> None:
    """The same command resumes at ``step`` and ends as a run that was never stopped."""
    launcher.finish(run, ranks=2)
    assert run.receipts()[-1]["step"] == step
    assert run.receipts()[-1]["bitwise"]
    assert run.counting() == uninterrupted.counting()
    assert tensor_digests(run.step_folder(STEPS)) == tensor_digests(uninterrupted.step_folder(STEPS))


@pytest.mark.parametrize(
    ("number", "ranks"),
    [
        (signal.SIGTERM, [0]),
        pytest.param(signal.SIGTERM, [1], marks=pytest.mark.smoke),
        (signal.SIGTERM, [0, 1]),
        (signal.SIGINT, [0, 1]),
    ],
    ids=["TERM to rank 0", "TERM to rank 1", "TERM to all", "INT to all"],
)
def test_stop_signal_while_training_commits_step_exits_75(
    launcher: Launcher,
    corpus: Path,
    tmp_path: Path,
    uninterrupted: Run,
    number: signal.Signals,
    ranks: list[int],
) -> None:
    run = make_run(tmp_path, corpus, **SETTINGS)
    attempt = launcher.start(run, ranks=2)
    wait_for(lambda: len(run.rows()) > 4, attempt)
    for rank in ranks:
        for one in (signal.SIGCONT, number, number):  # they arrive back to back, and more than once
            attempt.signal(one, rank=rank)
    ended = attempt.wait()
    assert_stopped(run, ended, number)
    assert_resumes_bitwise(launcher, run, uninterrupted, run.record["last_exit"]["step"])


def assert_stopped(run: Run, ended: Ended, number: signal.Signals) -> None:
    assert ended.statuses == [75, 75], ended.output
    step = max(row["step"] for row in run.rows())
    assert 0 <= step < STEPS
    assert run.sound() == [step]
    last_exit = run.record["last_exit"]
    assert (last_exit["status"], last_exit["step"]) == (75, step)
    assert number.name in last_exit["reason"]
    assert number.name in ended.outputs[0]
    assert "the same command" in ended.outputs[0]
    assert "Traceback" not in ended.output


def test_stop_signal_before_first_step_is_not_lost(
    launcher: Launcher, corpus: Path, tmp_path: Path, uninterrupted: Run
) -> None:
    run = make_run(tmp_path, corpus, **SETTINGS)
    attempt = launcher.start(run, ranks=2)
    wait_for((run.folder / "run.json").exists, attempt)
    attempt.signal(signal.SIGTERM, rank=1)
    ended = attempt.wait()
    assert ended.statuses == [75, 75], ended.output
    last_exit = run.record["last_exit"]
    assert last_exit["status"] == 75
    assert "SIGTERM" in last_exit["reason"]
    assert "the same command" in ended.outputs[0]
    assert "Traceback" not in ended.output
    launcher.finish(run, ranks=2)
    assert run.counting() == uninterrupted.counting()
    assert tensor_digests(run.step_folder(STEPS)) == tensor_digests(uninterrupted.step_folder(STEPS))


@pytest.mark.parametrize("rank", [0, 1])
def test_stop_rank_dies_alone_other_rank_ends(
    launcher: Launcher, corpus: Path, tmp_path: Path, uninterrupted: Run, rank: int
) -> None:
    # Collectives time out later than this test does: it must not take that for the other rank to end.
    settings = SETTINGS | {"checkpoint.interval": 2, "distributed.timeout_s": 600.0}
    run = make_run(tmp_path, corpus, **settings)
    attempt = launcher.start(run, ranks=2)
    wait_for(lambda: len(run.committed()) > 1, attempt)
    attempt.signal(signal.SIGKILL, rank=rank)
    ended = attempt.wait(WAIT_S)
    assert ended.statuses[rank] == -signal.SIGKILL
    assert ended.statuses[1 - rank] not in (0, 75, 2), ended.output
    assert run.sound() == run.committed()
    assert_resumes_bitwise(launcher, run, uninterrupted, run.committed()[0])


def test_stop_rank_hangs_alone_other_rank_times_out(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    """A rank that hangs alone ends the other after distributed.timeout_s."""
    run = make_run(tmp_path, corpus, **SETTINGS | {"checkpoint.interval": 2, "distributed.timeout_s": 3.0})
    attempt = launcher.start(run, ranks=2)
    wait_for(lambda: len(run.committed()) > 1, attempt)
    attempt.signal(signal.SIGSTOP, rank=1)
    wait_for(lambda: "Traceback" in attempt.output() or "imed out" in attempt.output(), attempt)
    attempt.signal(signal.SIGKILL, rank=1)
    ended = attempt.wait(WAIT_S)
    assert ended.statuses[0] not in (0, 75, 2), ended.output
    newest = run.committed()[0]
    assert run.sound() == run.committed()
    launcher.finish(run, ranks=2)
    assert run.receipts()[-1]["step"] == newest


# -- losses that are not finite ---------------------------------------------------------------------------

SKIPPING = {
    "train.max_steps": 8,
    "train.max_skipped_steps": 3,
    "scheduler.warmup_steps": 2,
    "checkpoint.interval": 4,
    "eval.interval": 0,
}


def poison(*steps: int) -> list[tuple[str, dict[str, object]]]:
    """The second micro-batch of rank 1 in these steps of the attempt; each rank has two a step."""
    return [("poison_loss", {"calls": [2 * step for step in steps], "rank": 1})]


def test_skipped_step_not_finite_on_one_rank_counts_on_all(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    plain = make_run(tmp_path / "plain", corpus, **SKIPPING)
    launcher.finish(plain, ranks=2)
    run = make_run(tmp_path / "poisoned", corpus, **SKIPPING)
    ended = launcher.run(run, ranks=2, faults=poison(3, 4, 6))
    assert ended.statuses == [0, 0], ended.output
    expected, found = plain.counting(), run.counting()
    for step in range(1, 9):
        for key in ("data/digest", "train/lr", "train/tokens"):  # a skipped step advances all of them
            assert found[step][key] == expected[step][key]
        assert math.isfinite(found[step]["train/loss"]) == (step not in (3, 4, 6))
    for step in (1, 2):
        assert found[step] == expected[step]
    counts = [row["train/skipped_steps"] for row in run.rows() if "train/loss" in row]
    assert counts == [0, 0, 1, 2, 2, 3, 3, 3]

    # Nothing of step 3 and 4 reached the weights: after 4 steps they are those after 2.
    short = make_run(tmp_path / "short", corpus, **SKIPPING | {"train.max_steps": 2})
    launcher.finish(short, ranks=2)
    assert tensor_digests(run.step_folder(4)) == tensor_digests(short.step_folder(2))


def test_skipped_steps_after_resume_still_count(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, corpus, **SKIPPING)
    ended = launcher.run(run, "--train.max_steps=4", ranks=2, faults=poison(3, 4))
    assert ended.statuses == [0, 0], ended.output
    ended = launcher.run(run, ranks=2, faults=poison(1))
    assert ended.statuses == [1, 1], "the third skipped step in a row is one too many, resumed or not"
    assert run.rows()[-1]["train/skipped_steps"] == 3


def test_skipped_steps_too_many_in_a_row_end_run(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, corpus, **SKIPPING)
    ended = launcher.run(run, ranks=2, faults=poison(2, 5, 6, 7, 8))
    assert ended.statuses == [1, 1], ended.output
    assert "not finite in 3 steps in a row" in ended.outputs[0]
    assert "Traceback" not in ended.output
    last_exit = run.record["last_exit"]
    assert (last_exit["status"], last_exit["step"]) == (1, 7)
    assert "not finite" in last_exit["reason"]
    assert run.sound() == [4]
    launcher.finish(run, ranks=2)
    assert run.receipts()[-1]["step"] == 4


@pytest.mark.smoke
def test_skipped_steps_diverging_lr_ends_run(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    """A learning rate that breaks the model ends the run, which does not train on without a model."""
    run = make_run(tmp_path, corpus, **SKIPPING | {"optimizer.lr": 1e30, "scheduler.warmup_steps": 0})
    ended = launcher.run(run, ranks=2)
    assert ended.statuses == [1, 1], ended.output
    assert "optimizer.lr" in ended.outputs[0]
    assert run.record["last_exit"]["status"] == 1


# -- saves that fail -------------------------------------------------------------------------------------

SAVING = {"checkpoint.interval": 2, "eval.interval": 0, "checkpoint.max_failed_saves": 3}


def full(
    *steps: int, rank: int, operation: str = "shard", error: str = "ENOSPC"
) -> list[tuple[str, dict[str, object]]]:
    """``rank`` cannot write the checkpoints of these steps."""
    where: dict[str, object] = {"rank": rank, "error": error}
    if operation == "shard":
        return [("failing_shards", where | {"name": f"/.step_{step:08d}."}) for step in steps]
    return [("failing", where | {"operation": operation, "name": f"/.step_{step:08d}."}) for step in steps]


@pytest.fixture(scope="module")
def saving(launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two ranks whose saves all succeed."""
    run = make_run(tmp_path_factory.mktemp("saving"), corpus, **SAVING)
    launcher.finish(run, ranks=2)
    return run


@pytest.mark.parametrize(
    ("operation", "rank", "error"),
    [
        ("write", 0, "ENOSPC"),
        ("shard", 0, "ENOSPC"),
        pytest.param("shard", 1, "EIO", marks=pytest.mark.smoke),
        ("fsync", 0, "EIO"),
        ("mkdir", 0, "EDQUOT"),
        ("rename", 0, "EIO"),
    ],
)
def test_failed_save_is_reported_and_training_continues(
    launcher: Launcher, corpus: Path, tmp_path: Path, saving: Run, operation: str, rank: int, error: str
) -> None:
    """Training continues with the same bits."""
    run = make_run(tmp_path, corpus, **SAVING)
    faults = full(4, 6, 10, rank=rank, operation=operation, error=error)
    ended = launcher.run(run, ranks=2, faults=faults)
    assert ended.statuses == [0, 0], ended.output
    assert ended.outputs[0].count("training continues") == 3
    assert f"rank {rank}" in ended.outputs[0]
    assert os.strerror(getattr(errno, error)) in ended.outputs[0]
    assert "Traceback" not in ended.output
    assert [row["step"] for row in run.rows() if "checkpoint/error" in row] == [4, 6, 10]
    assert [row["checkpoint/step"] for row in run.rows() if "checkpoint/step" in row] == [2, 8, 12]
    assert run.sound() == [12, 8, 2]
    assert run.unfinished() == []
    assert run.counting() == saving.counting()
    assert tensor_digests(run.step_folder(12)) == tensor_digests(saving.step_folder(12))


@pytest.mark.parametrize("rank", [0, 1])
def test_failed_saves_too_many_in_a_row_end_run(
    launcher: Launcher, corpus: Path, tmp_path: Path, rank: int
) -> None:
    """Older steps are left alone."""
    run = make_run(tmp_path, corpus, **SAVING)
    ended = launcher.run(run, ranks=2, faults=full(4, 6, 8, rank=rank))
    assert_gave_up(run, ended, step=8, newest=2)
    assert run.sound() == [2]
    launcher.finish(run, ranks=2)
    assert run.receipts()[-1]["step"] == 2


def assert_gave_up(run: Run, ended: Ended, *, step: int, newest: int) -> None:
    assert ended.statuses == [1, 1], ended.output
    assert ended.outputs[0].count("training continues") == 2
    assert "3 saves in a row failed" in ended.outputs[0]
    assert f"newest committed step is {newest}" in ended.outputs[0]
    assert "No space left on device" in ended.outputs[0]
    assert "Traceback" not in ended.output
    last_exit = run.record["last_exit"]
    assert (last_exit["status"], last_exit["step"]) == (1, step)
    assert "saves in a row failed" in last_exit["reason"]
    assert run.unfinished() == []


def test_failed_save_of_last_step_fails_run(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, corpus, **SAVING | {"checkpoint.interval": 5})
    ended = launcher.run(run, ranks=2, faults=full(12, rank=1))
    assert ended.statuses == [1, 1], ended.output
    assert "step_00000012 was not saved" in ended.outputs[0]
    assert run.record["last_exit"]["status"] == 1
    assert run.sound() == [10, 5]
    launcher.finish(run, ranks=2)
    assert run.sound() == [12, 10, 5]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 2.5 MB: two checkpoints fit, a third does not."""
    with mounted_tmpfs(tmp_path / "small_disk", "size=2500k") as folder:
        yield folder


@pytest.mark.parametrize("what", [pytest.param("the checkpoints", marks=pytest.mark.smoke), "the whole run"])
def test_full_disk_skips_saves_and_keeps_older_steps(
    launcher: Launcher, corpus: Path, tmp_path: Path, small_disk: Path, what: str
) -> None:
    key = "checkpoint.dir" if what == "the checkpoints" else "run.dir"
    run = make_run(tmp_path / "run", corpus, **SAVING, **{key: str(small_disk / "folder")})
    ended = launcher.run(run, ranks=2)
    assert run.sound() == [4, 2]
    assert run.unfinished() == []
    left_out = [row["step"] for row in run.rows() if "checkpoint/skipped_no_space" in row]
    assert left_out == [6, 8, 10, 12]
    assert "NO CHECKPOINT of step 6" in ended.outputs[0]
    assert ended.statuses == [1, 1], "the last step could not be committed"
    assert "No space left on device" in ended.outputs[0]
    assert "Traceback" not in ended.output


@pytest.mark.smoke
def test_full_disk_too_small_for_one_step_is_refused(
    launcher: Launcher, corpus: Path, tmp_path: Path, small_disk: Path
) -> None:
    (small_disk / "other").write_bytes(bytes(1_900_000))
    run = make_run(tmp_path / "run", corpus, **SAVING, **{"checkpoint.dir": str(small_disk / "folder")})
    ended = launcher.run(run, ranks=2)
    assert ended.statuses == [2, 2], ended.output
    assert "not one checkpoint would fit" in ended.outputs[0]
    assert run.rows() == []
