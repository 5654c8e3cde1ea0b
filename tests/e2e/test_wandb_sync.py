"""``kempnerforge wandb sync``: the rows that count, into one wandb run, by the real client."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.patch_target import patch_target
from support.runs import Launcher, Run, make_run
from support.wandb_server import WandbServer, fragments, history

from kempnerforge.checkpoint.run import lease, metadata
from kempnerforge.checkpoint.run.resume_report import Receipt
from kempnerforge.cli import app as command_line
from kempnerforge.cli.wandb import last_lasting_step
from kempnerforge.goodput.event_log import places, read_events
from kempnerforge.telemetry import wandb_upload
from kempnerforge.telemetry.jsonl import JsonlSink, by_step

pytest_plugins = ["support.run_fixtures", "support.wandb_fixtures"]

COMPARE = patch_target("kempnerforge.train.replay_check:ReplayCheck.compare")

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def sync(fresh_client: None, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> Any:
    """Call the command in this process; its status, and what it said on stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kempnerforge", "wandb", "sync", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            command_line.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call


def made_up_run(folder: Path, attempts: dict[int, tuple[int, range]], *, finished: bool = True) -> None:
    """The files of a run: by attempt, the step that it resumed from and the steps that it logged."""
    folder.mkdir()
    for attempt, (start, steps) in attempts.items():
        Receipt(attempt, step=start).write(folder)
        sink = JsonlSink(folder / "metrics.jsonl", attempt)
        for step in steps:
            sink.write({"step": step, "time": 1e9 + step, "train/loss": attempt + 1 / step})
        sink.close()
    last = max(attempts)
    ended = {"status": 0, "attempt": last, "reason": "", "step": 0, "time": 0.0} if finished else None
    metadata.write(folder, replace(metadata.new(), attempt=last, last_exit=ended))


KILLED_AFTER = (2, 6, 7, 10, 11)
"""Steps after which an attempt dies; checkpoints are at 4, 8 and 12."""


def kill_after(run: Run, launcher: Launcher, step: int, *overrides: str) -> None:
    done = run.receipts()[-1]["step"] if run.receipts() else 0
    resumed = max([0, *run.committed()])
    assert done <= resumed
    # The row of a step is written when its loss is compared: the next call is a step later.
    arguments = {"target": COMPARE, "call": step - resumed + 1}
    ended = launcher.run(run, *overrides, faults=[("kill_at_call", arguments)])
    assert ended.statuses == [-9], ended.output


def test_wandb_sync_killed_attempts_become_one_run(
    launcher: Launcher, corpus: Path, tmp_path: Path, server: WandbServer, sync: Any
) -> None:
    """Five killed attempts become one run with each step once."""
    run = make_run(tmp_path / "killed", corpus, **{"checkpoint.async_mode": "disabled"})
    for step in KILLED_AFTER[:3]:
        kill_after(run, launcher, step)
    status, out, err = sync(run.folder)
    assert (status, err) == (0, ""), out
    assert [row["_step"] for row in server.history] == list(range(5)), "up to the newest committed step"
    assert "held back: 3 steps up to 7" in out
    assert "uploaded 5 steps" in out
    for step in KILLED_AFTER[3:]:
        kill_after(run, launcher, step, "--optimizer.lr=0.002")
    launcher.finish(run, "--optimizer.lr=0.002")

    status, out, err = sync(run.folder)
    assert (status, err) == (0, ""), out
    assert "uploaded 8 steps" in out
    assert "5 were already there" in out
    counting = run.counting()
    assert [row["_step"] for row in server.history] == list(range(13)) == sorted(counting)
    for row in server.history:
        for key, value in counting[row["_step"]].items():
            assert repr(row[key]) == repr(value) or row[key] == value, (row["_step"], key)
    # Steps 5 to 7 were trained by attempts 2 to 4, and count as attempt 4 trained them, which got to step 8.
    assert [row.get("attempt") for row in server.history] == [2] * 5 + [4] * 4 + [6] * 4
    assert [row["_timestamp"] for row in server.history] == sorted(
        row["_timestamp"] for row in server.history
    )
    assert set(server.run_names) == {run.record["wandb_id"]}
    config = {key: entry["value"] for key, entry in server.configs[-1].items() if key != "_wandb"}
    assert config["optimizer"]["lr"] == 0.002
    assert config["attempt"] == 6
    ledger = [event for event in read_events(run.folder) if event["event"] == "start"]
    assert [config[f"place/attempt_{event['attempt']:04d}"]["hosts"] for event in ledger] == [
        event["hosts"] for event in ledger
    ]
    assert len(ledger) == 6
    receipts = [config[f"receipt/attempt_{attempt:04d}"] for attempt in range(1, 7)]
    assert [receipt["step"] for receipt in receipts] == [0, 0, 4, 4, 8, 8]
    changes = [receipt.get("config_changes", {}) for receipt in receipts]  # wandb drops what is empty
    assert changes[2:5] == [{}, {"optimizer.lr": [0.003, 0.002]}, {}]

    status, out, err = sync(run.folder)
    assert (status, err) == (0, "")
    assert "uploaded 0 steps" in out
    assert len(server.history) == 13
    assert server.exit_codes == [0, 0, 0]


def test_offline_fragments_of_killed_attempts_have_no_hole(
    launcher: Launcher, corpus: Path, tmp_path: Path, fresh_client: None
) -> None:
    """``wandb sync`` uploads the fragments in order; it takes no step again, and none below the newest."""
    settings = {"checkpoint.async_mode": "disabled", "metrics.enable_wandb": True}
    run = make_run(tmp_path / "killed", corpus, **settings)
    for step in KILLED_AFTER[1:4]:
        resumed = max([0, *run.committed()])
        arguments = {"target": COMPARE, "call": step - resumed + 1}
        ended = launcher.run(run, faults=[("kill_job_at_call", arguments)])
        assert ended.statuses == [-9], ended.output
    on_disk = [step for fragment in fragments(run.folder) for step in history(fragment)]
    assert sorted({row["step"] for row in run.rows()} - set(on_disk)), "each kill has lost the newest row"
    launcher.finish(run)
    rows = [row for fragment in fragments(run.folder) for row in history(fragment).values()]
    assert [row["_step"] for row in rows] == list(range(13)) == sorted(run.counting())
    for row in rows:
        assert row.get("train/loss") == run.counting()[row["_step"]].get("train/loss")


@pytest.mark.smoke
def test_wandb_sync_refused_rows_uploaded_by_repetition(
    tmp_path: Path, server: WandbServer, sync: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_upload, "_CONFIRM_S", 1.0)
    # It ends below what its second attempt had reached, with a lower train.max_steps.
    made_up_run(tmp_path / "run", {1: (0, range(1, 6)), 2: (3, range(4, 9)), 3: (6, range(7, 8))})
    server.refuse_from_step = 6
    status, _, err = sync(tmp_path / "run")
    assert status == 1
    assert "the upload to wandb" in err
    assert "run the command again" in err
    server.refuse_from_step = 1000
    status, out, _ = sync(tmp_path / "run", "--json")
    done = json.loads(out)
    assert status == 0
    assert done["uploaded"]["num_steps"] == 7 - (done["uploaded"]["first_new_step"] - 1)
    assert (done["rows"], done["rows_that_do_not_count"]) == (11, 4)
    assert [(row["_step"], row["train/loss"]) for row in server.history] == [
        (step, attempt + 1 / step) for step, attempt in enumerate([1, 1, 1, 2, 2, 2, 3], 1)
    ]


@pytest.mark.smoke
def test_wandb_sync_missing_key_or_server_is_reported(
    tmp_path: Path, sync: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up_run(tmp_path / "run", {1: (0, range(1, 4))})
    status, _, err = sync(tmp_path / "run")
    assert status == 1
    assert "there is no API key for http" in err
    assert "wandb login" in err
    monkeypatch.setattr(wandb_upload, "_INIT_TIMEOUT_S", 1.0)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    status, _, err = sync(tmp_path / "run")
    assert status == 1
    assert "the upload to wandb (http://127.0.0.1:9) is incomplete" in err
    assert "Traceback" not in err


@pytest.mark.smoke
def test_wandb_sync_dry_run_imports_no_wandb_and_no_torch(tmp_path: Path) -> None:
    """A dry run uses no network either."""
    made_up_run(tmp_path / "run", {1: (0, range(1, 6)), 3: (3, range(4, 9))})
    code = """
import sys
from kempnerforge.cli.app import main
try:
    main()
finally:
    assert not {"wandb", "torch"} & sys.modules.keys()
"""
    command = [sys.executable, "-c", code, "wandb", "sync", str(tmp_path / "run"), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "8 steps of 2 attempts, 1 to 8; 2 of 10 rows are not used" in done.stdout
    assert done.stdout.endswith("nothing was uploaded (--dry-run)\n")
    assert list(tmp_path.rglob("wandb")) == []


@pytest.mark.smoke
def test_wandb_sync_beside_online_attempt_is_refused(tmp_path: Path, sync: Any) -> None:
    made_up_run(tmp_path / "run", {1: (0, range(1, 4))})
    held = lease.acquire(tmp_path / "run")
    (tmp_path / "run" / "wandb").mkdir()
    newest = tmp_path / "run" / "wandb" / "latest-run"
    newest.symlink_to("run-20260101_000000-abc")
    status, _, err = sync(tmp_path / "run")
    assert status == 2
    assert "may be logging to wandb online" in err
    newest.unlink()
    newest.symlink_to("offline-run-20260101_000000-abc")
    assert "there is no API key" in sync(tmp_path / "run")[2], "offline it does no harm"
    held.release()


def test_wandb_sync_not_a_run_is_refused(tmp_path: Path, sync: Any) -> None:
    status, _, err = sync(tmp_path)
    assert status == 2
    assert "has no checkpoints; give a run's folder" in err
    made_up_run(tmp_path / "run", {1: (0, range(0))})
    (tmp_path / "run" / "metrics.jsonl").unlink()
    status, _, err = sync(tmp_path / "run")
    assert status == 2
    assert "nothing has been logged yet" in err


EXIT = {"reason": "", "step": 9, "time": 0.0}


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("last_exit", "committed", "expected"),
    [
        (None, [], 0),
        (None, [8, 4], 8),
        ({**EXIT, "attempt": 3, "status": 0}, [8, 4], float("inf")),
        ({**EXIT, "attempt": 3, "status": 0}, [], float("inf")),
        ({**EXIT, "attempt": 2, "status": 0}, [8, 4], 8),  # a later attempt is running, or was killed
        ({**EXIT, "attempt": 3, "status": 1}, [8], 8),
        ({**EXIT, "attempt": 3, "status": 75}, [9, 8], 9),
    ],
)
def test_last_lasting_step_holds_back_repeatable_steps(
    last_exit: dict[str, Any] | None, committed: list[int], expected: float
) -> None:
    """Steps that may be trained again are held back."""
    record = replace(metadata.new(), attempt=3, last_exit=last_exit)
    assert last_lasting_step(record, committed) == expected


@pytest.mark.smoke
def test_by_step_merges_rows_later_value_counts() -> None:
    rows = [{"step": 2, "a": 1, "attempt": 1}, {"step": 0, "a": 5}, {"step": 2, "b": 3, "attempt": 2}]
    assert list(by_step(rows).items()) == [
        (0, {"step": 0, "a": 5}),
        (2, {"step": 2, "a": 1, "b": 3, "attempt": 2}),
    ]


@pytest.mark.smoke
def test_places_of_attempts_read_from_ledger() -> None:
    start = {"event": "start", "time": 0.0, "slurm_job_id": "", "slurm_restart_count": 0}
    events = [
        {**start, "attempt": 1, "hosts": ["b", "a", "b", "a"]},
        {"event": "commit", "attempt": 1, "time": 1.0},
        {**start, "attempt": 3, "hosts": ["c"], "slurm_job_id": "77", "slurm_restart_count": 2},
    ]
    assert places(events) == {
        1: {"hosts": ["a", "b"]},
        3: {"hosts": ["c"], "slurm_job_id": "77", "slurm_restart_count": 2},
    }
