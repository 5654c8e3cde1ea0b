"""The real wandb client, offline and in trouble."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from support.polling import wait_until
from support.wandb_server import FAKE_KEY, Told, fragments, history, make_sink, records

from kempnerforge.telemetry import wandb_fragments, wandb_sink

pytest_plugins = ["support.wandb_fixtures"]
pytestmark = pytest.mark.usefixtures("fresh_client")


@pytest.mark.smoke
def test_wandb_sink_without_key_keeps_rows_offline(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Rows and receipt are kept in an offline fragment."""
    told = Told()
    sink = make_sink(tmp_path, told, attempt=2)
    sink.receipt({"chosen_step": 2, "rejected": [{"step": 3, "why": "damaged"}]})
    for step in (3, 4, 7):
        sink.write({"step": step, "time": 1.0, "train/loss": 1 / step, "data/digest": "ab"})
    sink.write({"step": 7, "time": 1.0, "checkpoint/step": 4, "checkpoint/commit_s": 0.25})
    sink.close()

    (fragment,) = fragments(tmp_path)
    rows = history(fragment)
    assert list(rows) == [3, 4, 7]
    assert {step: row["train/loss"] for step, row in rows.items()} == {3: 1 / 3, 4: 1 / 4, 7: 1 / 7}
    assert rows[7]["checkpoint/commit_s"] == 0.25
    assert rows[7]["attempt"] == 2
    by_type: dict[str, list[Any]] = {}
    for record in records(fragment):
        by_type.setdefault(record["type"], []).append(record[record["type"]])
    assert by_type["run"][0]["run_id"] == "run0001"
    assert by_type["run"][0]["config"]["update"]["train"] == {"max_steps": 8}
    updates = [config["update"] for config in by_type["config"]]
    expected = {"chosen_step": 2, "rejected": [{"step": 3, "why": "damaged"}]}
    place = {"hosts": ["node2"], "slurm_job_id": "7", "slurm_restart_count": 1}
    entries = {"attempt": 2, **place, "receipt/attempt_0002": expected, "place/attempt_0002": place}
    assert entries in updates
    assert told.warnings == []
    assert told.notes == [f"wandb: offline; to upload: kempnerforge wandb sync {tmp_path}"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.smoke
@pytest.mark.parametrize("mode", ["disabled", "offline", "dryrun"])
def test_wandb_sink_mode_variable_is_respected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
    told = Told()
    sink = make_sink(tmp_path, told)
    sink.write({"step": 1, "train/loss": 1.0})
    sink.close()
    assert told.warnings == []
    assert len(fragments(tmp_path)) == len(told.notes) == (0 if mode == "disabled" else 1)


@pytest.mark.smoke
def test_wandb_sink_start_failure_warns_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training continues."""
    monkeypatch.setenv("WANDB_MODE", "no-such-mode")
    told = Told()
    sink = make_sink(tmp_path, told)
    sink.receipt({"chosen_step": 0})
    sink.write({"step": 1, "train/loss": 1.0})
    sink.close()
    assert told.notes == []
    assert len(told.warnings) == 1
    assert told.warnings[0].startswith("wandb could not start")


@pytest.mark.smoke
def test_wandb_fragments_newest_step_is_what_is_on_disk(tmp_path: Path) -> None:
    """As wandb's own reader sees it, also where the log is cut off, and without attempts that left none."""
    sink = make_sink(tmp_path, Told(), attempt=2)
    for step in range(1, 6):
        sink.write({"step": step, "time": 1.0, "text": "x" * 40000})  # longer than a block of the log
    sink.close()
    (fragment,) = fragments(tmp_path)
    log = fragment / "run-run0001.wandb"

    def found(attempt: int, newest_steps: dict[int, int]) -> int:
        return wandb_fragments.first_missing_step(tmp_path, "run0001", attempt, newest_steps)

    wait_until(lambda: found(3, {2: 9}) == 6, "the client to write what it was handed")
    seen = []
    for keep_bytes in (300000, 170000, 130000):
        os.truncate(log, keep_bytes)
        seen.append(found(3, {2: 9}))
        assert seen[-1] == max(history(fragment)) + 1
    assert len(set(seen)) == 3, seen
    assert found(4, {2: 9, 3: 20}) == 21, (
        "attempt 3 was online, or its fragment has been uploaded and removed"
    )
    assert found(2, {}) == 0, "its own is not an earlier one"
    log.write_bytes(b"something else")
    with pytest.raises(ValueError, match="not a wandb log"):
        found(3, {2: 9})


CHILD_OF_A_TEST = """
import logging, os, signal, sys, time
from pathlib import Path
from kempnerforge.telemetry.wandb_sink import WandbSink

logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
sink = WandbSink(Path(sys.argv[1]), "proj", "a run", "run0001", {}, 1, place={}, first_new_step=0)
"""


def run_python(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` after making a sink, as a process group of its own."""
    program = CHILD_OF_A_TEST + textwrap.dedent(code)
    command = [sys.executable, "-c", program, str(folder)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, start_new_session=True
    )


@pytest.mark.smoke
def test_wandb_sink_dead_client_warns_once(tmp_path: Path) -> None:
    """Training continues."""
    done = run_python(
        tmp_path,
        """
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        for child in children:
            os.killpg(int(child), signal.SIGKILL)
        for step in range(200):
            sink.write({"step": step, "train/loss": 1.0})
            time.sleep(0.001)
        sink.close()
        print("trained to the end")
        """,
    )
    assert done.returncode == 0
    (warning,) = [line for line in done.stdout.splitlines() if "is disabled" in line]
    assert warning.endswith(f"kempnerforge wandb sync {tmp_path}")
    assert done.stdout.endswith("trained to the end\n")


def test_wandb_sink_kill_loses_at_most_newest_step(tmp_path: Path) -> None:
    code = """
    import wandb
    for step in range(1, 501):
        sink.write({"step": step, "train/loss": float(step)})
    print(wandb.run.settings.x_transaction_log_flush_interval, flush=True)
    time.sleep(600)
    """
    program = CHILD_OF_A_TEST + textwrap.dedent(code)
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            note, flush_interval_s = process.stdout.readline(), process.stdout.readline()
            assert "offline" in note
            assert float(flush_interval_s) <= 1, "so little of a killed attempt's time is missing in wandb"
            deadline = time.monotonic() + 60
            while len(history(fragments(tmp_path)[0])) < 499:
                assert time.monotonic() < deadline, "the rows are not flushed"
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert list(history(fragments(tmp_path)[0]))[:499] == list(range(1, 500))


def test_wandb_sink_unreachable_server_falls_back_to_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_sink, "_INIT_TIMEOUT_S", 1.0)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
    told = Told()
    sink = make_sink(tmp_path, told)
    sink.write({"step": 1, "train/loss": 0.5})
    sink.close()
    assert len(told.warnings) == 1
    assert "cannot be used online" in told.warnings[0]
    assert history(fragments(tmp_path)[0])[1]["train/loss"] == 0.5
