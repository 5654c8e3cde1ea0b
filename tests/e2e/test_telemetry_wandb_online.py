"""The real wandb client against a small local server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.wandb_server import Told, WandbServer, fragments, make_sink

from kempnerforge.telemetry import wandb_sink
from kempnerforge.telemetry.sinks import SinkSet
from kempnerforge.telemetry.wandb_sink import Earlier

pytest_plugins = ["support.wandb_fixtures"]
pytestmark = pytest.mark.usefixtures("fresh_client")


@pytest.mark.smoke
def test_wandb_online_attempts_continue_one_run(tmp_path: Path, server: WandbServer) -> None:
    told = [Told(), Told()]
    for attempt, steps in ((1, range(1, 6)), (2, range(4, 9))):
        sink = make_sink(tmp_path, told[attempt - 1], attempt=attempt)
        sink.receipt({"chosen_step": steps[0] - 1})
        for step in steps:
            sink.write({"step": step, "train/loss": 10.0 * attempt + step})
        sink.close()
    # Steps 4 and 5 were trained twice: wandb keeps the first, and nothing is out of order.
    assert [(row["_step"], row["attempt"]) for row in server.history] == [
        *((step, 1) for step in range(1, 6)),
        *((step, 2) for step in range(6, 9)),
    ]
    assert set(server.run_names) == {"run0001"}
    for attempt in (1, 2):
        receipt = {"chosen_step": 3 * attempt - 3}
        assert server.configs[-1][f"receipt/attempt_000{attempt}"] == {"value": receipt}
        place = server.configs[-1][f"place/attempt_000{attempt}"]["value"]
        assert place == {
            "hosts": [f"node{attempt}"],
            "slurm_job_id": "7",
            "slurm_restart_count": attempt - 1,
        }
    newest = {key: server.configs[-1][key]["value"] for key in ("attempt", "hosts", "slurm_restart_count")}
    assert newest == {"attempt": 2, "hosts": ["node2"], "slurm_restart_count": 1}
    assert server.exit_codes == [0, 0]
    assert [len(one.notes) for one in told] == [1, 2]
    assert told[1].notes[1].startswith("wandb: an earlier attempt has logged up to step 5;")
    assert told[0].warnings == told[1].warnings == []
    assert fragments(tmp_path) == []


def test_wandb_online_unsent_rows_logged_by_next_attempt(tmp_path: Path, server: WandbServer) -> None:
    told = [Told(), Told()]
    rows = {step: {"step": step, "time": 100.0 + step, "train/loss": 10.0 + step} for step in range(1, 6)}
    sink = make_sink(tmp_path, told[0])
    for row in rows.values():
        sink.write(row)
    sink.close()
    del server.history[3:]  # the client was killed before it had sent them
    sink = make_sink(tmp_path, told[1], attempt=2)
    place = {"place/attempt_0001": {"hosts": ["node1"]}}
    sink.catch_up(
        lambda: Earlier(place, {step: row | {"attempt": 1} for step, row in rows.items()}, {1: max(rows)})
    )
    sink.write({"step": 6, "train/loss": 26.0})
    sink.close()
    logged = [(row["_step"], row["attempt"], row["train/loss"]) for row in server.history]
    assert logged == [*((step, 1, 10.0 + step) for step in range(1, 6)), (6, 2, 26.0)]
    assert [row["_timestamp"] for row in server.history[3:5]] == [104.0, 105.0]
    assert server.configs[-1]["place/attempt_0001"]["value"] == {"hosts": ["node1"]}
    assert told[1].warnings == []


def test_wandb_online_close_during_error_marks_run_failed(tmp_path: Path, server: WandbServer) -> None:
    sinks = SinkSet([make_sink(tmp_path, Told())])

    def train() -> None:
        try:
            raise RuntimeError("diverged")
        finally:
            sinks.close()

    with pytest.raises(RuntimeError, match="diverged"):
        train()
    assert server.exit_codes == [1]


def test_wandb_online_lost_server_does_not_delay_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: WandbServer
) -> None:
    monkeypatch.setattr(wandb_sink, "_FINISH_TIMEOUT_S", 2.0)
    told = Told()
    sink = make_sink(tmp_path, told)
    server.shutdown()
    server.server_close()
    sink.write({"step": 1, "train/loss": 0.5})
    sink.close()  # without a time limit, the client would go on trying for longer than this test may take
    assert len(told.warnings) == 1
    assert "wandb sync" in told.warnings[0]


def test_wandb_offline_fragments_upload_into_one_run(tmp_path: Path, server: WandbServer) -> None:
    told = [Told(), Told()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        for attempt, steps, first_new_step in ((1, range(1, 6), 0), (2, range(4, 9), 6)):
            sink = make_sink(tmp_path, told[attempt - 1], attempt=attempt, first_new_step=first_new_step)
            for step in steps:
                sink.write({"step": step, "train/loss": 10.0 * attempt + step})
            sink.close()
    command = [sys.executable, "-m", "wandb", "sync", *map(str, fragments(tmp_path))]
    subprocess.run(command, timeout=60, check=True, capture_output=True)
    assert [(row["_step"], row["train/loss"]) for row in server.history] == [
        *((step, 10.0 + step) for step in range(1, 6)),
        *((step, 20.0 + step) for step in range(6, 9)),
    ]
    assert set(server.run_names) == {"run0001"}
    assert told[1].notes[1].startswith("wandb: an earlier attempt has logged up to step 5;")
