"""Loops of users' own: what they log, what the ledger says of them, and what the commands make of that."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import own_loop
from support.ranks import run_ranks

from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.format.manifest import read
from kempnerforge.checkpoint.manager import CheckpointManager
from kempnerforge.checkpoint.results import RunContext
from kempnerforge.checkpoint.run import metadata
from kempnerforge.checkpoint.save.writer_client import Writer
from kempnerforge.checkpoint.state.train_state import TrainState
from kempnerforge.config.schema import CheckpointConfig
from kempnerforge.errors import LeaseHeldError, LeaseLostError, SaveFailedError
from kempnerforge.goodput.event_log import read_events
from kempnerforge.goodput.history import read_history

LOGGER = "kempnerforge.checkpoint.manager"


def command(*arguments: object) -> Any:
    """What a command of ``kempnerforge`` prints as JSON."""
    words = [sys.executable, "-m", "kempnerforge", *map(str, arguments), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def state_of(folder: Path, step: int) -> tuple[str, str]:
    """What ``ckpt explain`` says of a step, and why."""
    told = command("ckpt", "explain", folder, step)
    return told["state"], told["why"]


def hang(**settings: Any) -> subprocess.Popen[str]:
    """Start a loop and return when it hangs."""
    process = own_loop.start(**settings)
    assert process.stdout is not None
    assert process.stdout.readline() == "hangs\n", process.communicate()
    return process


def kill(process: subprocess.Popen[str]) -> str:
    """SIGKILL; returns what the process has logged."""
    process.send_signal(signal.SIGKILL)
    return process.communicate(timeout=60)[1]


def training(folder: Path, **config: Any) -> tuple[CheckpointManager, TrainState]:
    model = torch.nn.Linear(8, 1)
    state = TrainState(model=model, optimizer=torch.optim.AdamW(model.parameters()))
    settings = CheckpointConfig.model_validate({"interval": 1, "save_last": False, **config})
    return CheckpointManager(settings, state=state, run_dir=folder), state


def train(ckpt: CheckpointManager, state: TrainState, until: int) -> None:
    while state.step < until:
        state.advance()
        ckpt.after_step(state)


def ends(folder: Path) -> list[tuple[str, str]]:
    return [(one.kind, one.reason) for one in read_history(folder)]


def test_own_loop_killed_and_resumed_is_known_to_commands(tmp_path: Path) -> None:
    run = tmp_path / "own"
    settings = {"interval": 10, "keep_last_n": 2, "async_mode": "disabled"}
    loop = {"folder": run, "max_steps": 60, "checkpoint": settings, "step_s": 0.01}
    first = kill(hang(**loop, hang_at=47)).splitlines()
    assert f"INFO {LOGGER}: fresh start at step 0" in first
    assert sum("is committed (interval)" in line for line in first) == 4
    second = own_loop.run(**loop)
    assert second.returncode == 0, second.stderr
    assert f"INFO {LOGGER}: resumed from {run}/checkpoints/step_00000040 at step 40" in second.stderr
    assert second.stderr.splitlines()[-1] == f"INFO {LOGGER}: attempt 2: finished at step 60"

    lost = read_history(run)[0].last_step - 40
    assert lost > 0
    found = command("report", run)
    assert [(one["kind"], one["began_at"], one["last_step"]) for one in found["attempts"]] == [
        ("lost", 0, 40 + lost),
        ("finished", 40, 60),
    ]
    assert found["lost_steps"] == lost
    assert found["parts_s"]["lost"] > 0
    assert 0 < found["ettr"] < 1
    assert command("ckpt", "inspect", run / "checkpoints" / paths.step_name(60))["attempt"] == 2

    record = metadata.read(run)
    assert record is not None
    assert record.attempt == 2
    inspected = command("ckpt", "inspect", run / "checkpoints/latest")
    assert (inspected["run_id"], inspected["layout"]) == (record.run_id, {"num_ranks": 1})
    assert inspected["versions"]["torch"] == torch.__version__
    assert [one["attempt"] for one in command("ckpt", "ls", run)["steps"]] == [2, 2]
    explained = command("ckpt", "explain", run)
    assert explained["policy"] == ["the last 2"]
    assert [(one["step"], one["keep"]) for one in explained["steps"]] == [(60, True), (50, True)]

    assert state_of(run, 60)[0] == "kept"
    assert state_of(run, 10) == (
        "deleted",
        "attempt 1 deleted it after step 30 was committed: no rule kept it (kept: the last 2; the newest)",
    )
    assert state_of(run, 41)[0] == "not due"
    assert state_of(run, 41)[1].endswith("the one before at step 40, the next one at step 50")
    assert state_of(run, 70)[0] == "beyond"


def test_own_loop_receipt_counts_lost_steps(tmp_path: Path) -> None:
    """There is no ``metrics.jsonl``: the ledger tells how far the attempt before had come."""
    ckpt, state = training(tmp_path, interval=3)
    with ckpt:
        ckpt.resume(state)
        train(ckpt, state, 5)
    ckpt, state = training(tmp_path)
    with ckpt:
        assert ckpt.resume(state).lost_steps == 2
    receipts = [json.loads(line) for line in (tmp_path / "receipts.jsonl").read_text().splitlines()]
    assert [(row["attempt"], row["step"], row["lost_steps"]) for row in receipts] == [(1, 0, 0), (2, 3, 2)]


def test_own_loop_second_live_process_is_refused(tmp_path: Path) -> None:
    loop = {"folder": tmp_path, "max_steps": 5, "checkpoint": {"interval": 2}}
    first = hang(**loop, hang_at=3)
    before = read_events(tmp_path)
    second = own_loop.run(**loop)
    assert second.returncode == 1
    assert f"LeaseHeldError: {tmp_path} is being written by attempt 1, pid {first.pid}" in second.stderr
    assert f"Stop that one first (kill {first.pid} " in second.stderr
    assert "give this run another run_dir" in second.stderr
    assert read_events(tmp_path) == before
    kill(first)
    third = own_loop.run(**loop)
    assert third.returncode == 0, third.stderr
    assert f"took the run over from attempt 1, pid {first.pid}" in third.stderr
    assert [kind for kind, _ in ends(tmp_path)] == ["lost", "finished"]


def test_own_loop_save_put_off_is_told_once(tmp_path: Path) -> None:
    settings = {"interval": 5, "keep_last_n": 9}
    done = own_loop.run(folder=tmp_path, max_steps=40, checkpoint=settings, step_s=0.02, write_s=0.3)
    assert done.returncode == 0, done.stderr
    episodes = [event for event in read_events(tmp_path) if event["event"] == "put_off"]
    began = [event for event in episodes if event["to_step"] is None]
    over = [event for event in episodes if event["to_step"] is not None]
    assert began
    assert [event["from_step"] for event in began] == [event["from_step"] for event in over]
    told = [line for line in done.stderr.splitlines() if "put off: step" in line]
    assert told == [
        f"INFO {LOGGER}: save of step {event['from_step']} put off: "
        f"step {event['writing']} is still being written"
        for event in began
    ]
    one = over[0]
    assert one["writing"] < one["from_step"] <= one["to_step"] < one["saved_step"]
    state, why = state_of(tmp_path, one["from_step"])
    assert (state, f"step {one['saved_step']} was saved instead" in why) == ("put off", True)


def test_own_loop_that_is_never_left_is_recorded(tmp_path: Path) -> None:
    """Without a ``with``, the end of the interpreter ends the attempt."""
    loop = {"folder": tmp_path, "max_steps": 9, "checkpoint": {"interval": 2}}
    failed = own_loop.run(**loop, raise_at=3, leave=False)
    assert failed.returncode == 1
    assert f"WARNING {LOGGER}: attempt 1: ValueError: the loop is broken" in failed.stderr
    assert own_loop.run(**loop, finish=False, leave=False).returncode == 0
    assert ends(tmp_path) == [
        ("fault", "ValueError: the loop is broken"),
        ("stopped", "ended at step 9 without finish()"),
    ]


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (None, "stopped", "closed at step 2 without finish()"),
        (ValueError("the loop is broken"), "fault", "ValueError: the loop is broken"),
        (KeyboardInterrupt(), "stopped", "KeyboardInterrupt"),
        (SystemExit(0), "stopped", "SystemExit: 0"),
        (SystemExit("no data"), "fault", "SystemExit: no data"),
    ],
)
def test_own_loop_left_before_finish_is_recorded(
    tmp_path: Path, error: BaseException | None, kind: str, reason: str
) -> None:
    def leave() -> None:
        ckpt, state = training(tmp_path)
        with ckpt:
            ckpt.resume(state)
            train(ckpt, state, 2)
            if error is not None:
                raise error

    for _ in range(2):
        with contextlib.nullcontext() if error is None else pytest.raises(type(error)):
            leave()
    assert ends(tmp_path) == [(kind, reason)] * 2
    ckpt, state = training(tmp_path)
    with ckpt:
        assert ckpt.resume(state).step == 2, "a user's error makes no step suspect"


@pytest.mark.smoke
def test_own_loop_failed_and_skipped_saves_are_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ckpt, state = training(tmp_path)

    def fail(*_: Any, **__: Any) -> Any:
        raise SaveFailedError("no disk")

    with caplog.at_level(logging.INFO, LOGGER), ckpt:
        ckpt.resume(state)
        with monkeypatch.context() as patch:
            patch.setattr(Writer, "write", fail)
            train(ckpt, state, 1)
        with monkeypatch.context() as patch:
            patch.setattr(ckpt._housekeeping, "no_room", lambda step: f"no room for step {step}")
            train(ckpt, state, 2)
        train(ckpt, state, 3)
        ckpt.finish(state)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings[0].startswith("the save of step 1 failed: ")
    assert "no disk" in warnings[0]
    assert warnings[1:] == ["no room for step 2"]
    assert state_of(tmp_path, 1)[0] == "failed"
    assert "no disk" in state_of(tmp_path, 1)[1]
    assert state_of(tmp_path, 2) == (
        "skipped",
        "attempt 1 skipped its save for lack of space: no room for step 2",
    )
    assert state_of(tmp_path, 3)[0] == "kept"


def test_explain_names_what_a_step_was_set_aside_as(tmp_path: Path) -> None:
    ckpt, state = training(tmp_path, keep_last_n=9)
    with ckpt:
        ckpt.resume(state)
        train(ckpt, state, 5)
    folder = tmp_path / "checkpoints"
    (folder / paths.step_name(5) / "manifest.json").write_text("{")
    ckpt, state = training(tmp_path, keep_last_n=9)
    with ckpt:
        assert ckpt.resume(state).step == 4
    command("ckpt", "rollback", tmp_path, 2)
    (folder / ".step_00000007.2.tmp").mkdir()
    state_5, why_5 = state_of(tmp_path, 5)
    assert state_5 == "set aside"
    assert why_5.startswith(
        "it was found damaged at a resume, and it was set aside as quarantined.step_00000005.1: "
    )
    assert state_of(tmp_path, 4) == (
        "set aside",
        "a rollback went back to an older step, and it was set aside as rolledback.step_00000004.1",
    )
    assert state_of(tmp_path, 7)[0] == "lost"
    assert state_of(tmp_path, 2)[0] == "kept"


def test_own_loop_pending_commit_at_exit_is_recorded(tmp_path: Path) -> None:
    """Nobody asks the other ranks about a save that is pending when the loop is left."""
    ckpt, state = training(tmp_path, async_mode="async")
    with ckpt:
        ckpt.resume(state)
        train(ckpt, state, 1)
    assert [event["step"] for event in read_events(tmp_path) if event["event"] == "commit"] == [1]


def test_own_loop_excluded_time_is_no_step_time(tmp_path: Path) -> None:
    ckpt, state = training(tmp_path)
    with ckpt:
        ckpt.resume(state)
        ckpt.exclude_time(1000.0)
        train(ckpt, state, 1)
        ckpt.finish(state)
    (one,) = read_history(tmp_path)
    assert one.end is not None
    assert one.end["spent_s"] == {"step": 0.0, "eval": 1000.0}


def test_manager_without_resume_keeps_a_record(tmp_path: Path) -> None:
    ckpt, state = training(tmp_path)
    assert list(tmp_path.iterdir()) == [], "making one writes nothing"
    with ckpt:
        train(ckpt, state, 3)
        ckpt.finish(state)
    (one,) = read_history(tmp_path)
    assert (one.began_at, one.last_step, one.kind) == (0, 3, "finished")
    assert one.resume is not None
    assert one.resume["source"] == "not resumed"


def test_manager_dropped_or_replaced_gives_run_back(tmp_path: Path) -> None:
    dropped, state = training(tmp_path)
    dropped.resume(state)
    train(dropped, state, 1)
    del dropped
    gc.collect()
    assert ends(tmp_path) == [("stopped", "ended at step 1 without finish()")]
    older, state = training(tmp_path)
    older.resume(state)
    train(older, state, 2)
    newer, again = training(tmp_path)
    newer.resume(again)
    assert again.step == 2
    state.advance()
    with pytest.raises(SaveFailedError, match="commits nothing any more"):
        older.save(state, wait=True)
    with pytest.raises(LeaseLostError):
        train(older, state, 4)
    newer.finish(again)
    newer.close()
    older.close()
    kinds = [kind for kind, _ in ends(tmp_path)]
    assert kinds == ["stopped", "stopped", "finished"]
    assert "another CheckpointManager of this process" in ends(tmp_path)[1][1]


@pytest.mark.smoke
def test_manager_with_context_logs_and_records_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The harness does it by itself; nothing is said twice."""
    model = torch.nn.Linear(8, 1)
    state = TrainState(model=model, optimizer=torch.optim.AdamW(model.parameters()))
    config = CheckpointConfig(interval=1)
    with (
        caplog.at_level(logging.INFO),
        CheckpointManager(config, state=state, run_dir=tmp_path, context=RunContext(run_id="r")) as ckpt,
    ):
        ckpt.resume(state)
        train(ckpt, state, 2)
        ckpt.finish(state)
    assert [record for record in caplog.records if record.name.startswith("kempnerforge")] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "receipts.jsonl"]


def test_own_loop_adopts_checkpoints_without_run_file(tmp_path: Path) -> None:
    """Earlier versions wrote no ``run.json`` for loops of users' own."""
    model = torch.nn.Linear(8, 1)
    state = TrainState(model=model, optimizer=torch.optim.AdamW(model.parameters()))
    old = RunContext(run_id="abc", attempt=7, layout={"num_ranks": 1})
    with CheckpointManager(
        CheckpointConfig(interval=1), state=state, run_dir=tmp_path, context=old
    ) as earlier:
        train(earlier, state, 3)
    ckpt, state = training(tmp_path, keep_last_n=9)
    with ckpt:
        assert ckpt.resume(state).step == 3
        train(ckpt, state, 4)
    provenance = read(tmp_path / "checkpoints" / paths.step_name(4)).provenance
    assert (provenance.run_id, provenance.attempt, provenance.parent_step) == ("abc", 8, 3)
    assert paths.committed_steps(tmp_path / "checkpoints") == [4, 3, 2, 1]


def loop_of_ranks(folder: str, how: str) -> list[str]:
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    model = torch.nn.Linear(8, 1)
    state = TrainState(model=model, optimizer=torch.optim.AdamW(model.parameters()))
    ckpt = CheckpointManager(
        CheckpointConfig(interval=1), state=state, run_dir=Path(folder), control_group=group
    )
    logged = io.StringIO()
    logging.getLogger(LOGGER).addHandler(logging.StreamHandler(logged))
    logging.getLogger(LOGGER).setLevel(logging.INFO)
    if how == "refused":
        with pytest.raises(LeaseHeldError):
            ckpt.resume(state)
    else:
        # What the other rank sees of it, by another name: gloo takes its time.
        error = ValueError("broken") if dist.get_rank() == 1 else RuntimeError("Connection closed by peer")
        with pytest.raises(type(error)), ckpt:  # noqa: PT012
            ckpt.resume(state)
            train(ckpt, state, 2)
            raise error
    return logged.getvalue().splitlines()


def test_own_loop_of_two_ranks_tells_on_the_first(tmp_path: Path) -> None:
    first, second = run_ranks(loop_of_ranks, 2, str(tmp_path), "broken")
    assert any("step 2 is committed" in line for line in first)
    assert second == []
    (one,) = read_history(tmp_path)
    assert one.kind == "fault"
    assert one.reason.startswith("rank 1 on ")
    assert "ValueError: broken" in one.reason
    assert one.start is not None
    assert one.start["layout"] == {"num_ranks": 2}
    holder = hang(folder=tmp_path, max_steps=9, checkpoint={"interval": 0}, hang_at=2)
    assert os.path.exists(f"/proc/{holder.pid}")
    run_ranks(loop_of_ranks, 2, str(tmp_path), "refused")
    kill(holder)
