"""``kempnerforge ls``: the state of each run, from what is on disk."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kempnerforge.checkpoint.run import lease, metadata
from kempnerforge.checkpoint.run.metadata import Rollback
from kempnerforge.cli import log_end, run_state
from kempnerforge.cli.app import app
from kempnerforge.cli.log_end import lines_from_end
from kempnerforge.cli.run_state import read_state


def run_with(
    folder: Path,
    *,
    attempt: int = 1,
    last_exit: dict[str, Any] | None = None,
    events: list[dict[str, Any]] = (),  # type: ignore[assignment]
    rows: list[dict[str, Any]] = (),  # type: ignore[assignment]
    steps: tuple[int, ...] = (),
) -> Path:
    """A run's folder with these records, and committed steps of 1,000 bytes."""
    folder.mkdir(parents=True)
    record = metadata.new(attempt=attempt, last_exit=last_exit)
    metadata.write(folder, replace(record, created=1000.0))
    for name, lines in (("ledger.jsonl", events), ("metrics.jsonl", rows)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in steps:
        (folder / f"checkpoints/step_{step:08d}").mkdir(parents=True)
        (folder / f"checkpoints/step_{step:08d}/manifest.json").write_text("x" * 1000)
    return folder


def row(step: int, attempt: Any = 1, **values: Any) -> dict[str, Any]:
    return {"step": step, "attempt": attempt, "time": 2000.0 + step, "train/loss": 3.0, **values}


def start(max_steps: int, attempt: int = 1) -> dict[str, Any]:
    return {"event": "start", "attempt": attempt, "time": 1500.0, "config": {"train.max_steps": max_steps}}


def ended(status: int, attempt: int = 1) -> dict[str, Any]:
    return {"status": status, "reason": "why", "step": 9, "attempt": attempt, "time": 3000.0}


def end(kind: str) -> dict[str, Any]:
    return {"event": "end", "attempt": 1, "time": 4000.0, "kind": kind, "reason": "why", "step": 9}


STATES: dict[str, tuple[dict[str, Any], str]] = {
    "finished": ({"last_exit": ended(0)}, "finished"),
    "stopped": ({"last_exit": ended(75)}, "stopped"),
    "a fault": ({"last_exit": ended(1)}, "failed"),
    "killed": ({"events": [start(9)]}, "failed"),
    "killed after an attempt that stopped": ({"attempt": 2, "last_exit": ended(75)}, "failed"),
    "never started": ({"attempt": 0}, "new"),
    "an own loop that finished": ({"events": [start(9), end("finished")]}, "finished"),
    "an own loop at its deadline": ({"events": [end("deadline")]}, "stopped"),
    "an own loop with a fault": ({"events": [end("fault")]}, "failed"),
}


@pytest.mark.parametrize("kind", STATES)
def test_run_state_is_derived_from_disk(tmp_path: Path, kind: str) -> None:
    settings, expected = STATES[kind]
    assert read_state(run_with(tmp_path / "run", **settings)).state == expected


def test_run_state_of_held_lease_is_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_with(tmp_path / "run", attempt=1, last_exit=ended(75))
    held = lease.acquire(run)
    try:
        assert read_state(run).state == "running"
        monkeypatch.setattr(run_state, "LEASE_SILENT_S", -1.0)
        assert read_state(run).state == "stopped", "a lease that nobody renews is not a running run"
    finally:
        held.release()
    monkeypatch.undo()
    assert read_state(run).state == "stopped"


def test_run_state_after_rollback_leaves_out_later_rows(tmp_path: Path) -> None:
    rows = [row(1), row(2, **{"eval/loss": 2.5}), row(3, **{"train/loss": 9.0, "eval/loss": 9.0})]
    run = run_with(tmp_path / "run", rows=rows, events=[start(9), end("stopped")], steps=(2,))
    record = metadata.read(run)
    assert record is not None
    back = Rollback(
        attempt=2, step=2, time=0.0, timeline_id="", timeline_first_attempt=0, set_aside=["rolledback.step_3"]
    )
    metadata.write(run, replace(record, attempt=2, rollbacks=(back,)))
    state = read_state(run)
    assert (state.step, state.loss, state.eval_loss, state.committed) == (2, 3.0, 2.5, 2)


def test_run_list_shows_columns_and_json(tmp_path: Path) -> None:
    rows = [row(step, **({"eval/loss": 2.0} if step == 2 else {})) for step in range(1, 6)]
    runs = tmp_path / "runs"
    run_with(runs / "new", attempt=0)
    run_with(runs / "sweep/a", rows=rows, events=[start(10)], last_exit=ended(75), steps=(2, 4))
    run_with(runs / "nan", rows=[row(7, **{"train/loss": "NaN"})], last_exit=ended(1))
    run_with(runs / "torn", rows=rows)
    (runs / "torn/run.json").write_text("{")
    (runs / ".hidden").mkdir()
    (runs / "no_run").mkdir()
    done = CliRunner().invoke(app, ["ls", str(runs)])
    assert done.exit_code == 0
    lines = [line.split() for line in done.output.splitlines()]
    assert lines[0] == ["run", "state", "step", "loss", "eval", "last", "seen", "committed", "size"]
    by_name = {line[0]: line for line in lines[1:]}
    assert by_name["sweep/a"][1:5] == ["stopped", "5/10", "3.0000", "2.0000"]
    assert by_name["sweep/a"][-4:] == ["ago", "4", "2.0", "kB"]
    assert by_name["nan"][1:4] == ["failed", "7", "nan"]
    assert by_name["new"][1:3] == ["new", "0"]
    assert by_name["torn"][1] == "unknown"
    assert len(by_name) == 4
    listed = json.loads(CliRunner().invoke(app, ["ls", str(runs), "--json"]).output)["runs"]
    by_dir = {Path(state["run_dir"]).name: state for state in listed}
    assert by_dir["nan"]["loss"] == "NaN"
    assert (by_dir["a"]["size_bytes"], by_dir["a"]["max_steps"]) == (2000, 10)
    assert "run.json cannot be read" in by_dir["torn"]["reason"]


@pytest.mark.parametrize("content", ['"NaN"', "NaN", '"Infinity"', "1e999", "-1e999", "1" + 400 * "0"])
def test_run_list_ignores_times_that_are_no_numbers(tmp_path: Path, content: str) -> None:
    other = {"event": "progress", "attempt": 1, "time": 0.0, "step": 1}
    run = run_with(tmp_path / "run", rows=[row(1), row(2)], events=[start(9), other])
    for name in ("metrics.jsonl", "ledger.jsonl"):
        lines = (run / name).read_text().splitlines()
        lines[-1] = re.sub(r'"time": [^,}]*', f'"time": {content}', lines[-1])
        lines[-1] = re.sub(r'"train/loss": [^,}]*', f'"train/loss": {content}', lines[-1])
        (run / name).write_text("\n".join(lines) + "\n")
    listed = CliRunner().invoke(app, ["ls", str(tmp_path)])
    assert listed.exit_code == 0, listed.exception
    assert "run  " in listed.output
    assert read_state(run).seen == 1500.0


@pytest.mark.parametrize(("name", "problem"), [("nowhere", "does not exist"), ("file", "is a file")])
def test_run_list_of_no_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("empty").mkdir()
    done = CliRunner().invoke(app, ["ls", name])
    assert str(done.exception) == f"{name} {problem}; give the folder that has the folders of the runs"
    assert CliRunner().invoke(app, ["ls", "empty"]).output == "empty has no runs\n"


def test_lines_from_end_read_only_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "log"
    lines = [f"{number}:{'x' * (number % 37)}".encode() for number in range(2000)]
    file.write_bytes(b"\n".join(lines) + b"\n")
    monkeypatch.setattr(log_end, "FIRST_BYTES", 64)
    assert [line for line in lines_from_end(file) if line] == lines[::-1]
    monkeypatch.setattr(log_end, "MOST_BYTES", 1000)
    read = [line for line in lines_from_end(file) if line]
    assert read[:-1] == lines[: -len(read) : -1]
    assert sum(map(len, read)) < 1000
    assert list(lines_from_end(tmp_path / "none")) == []
