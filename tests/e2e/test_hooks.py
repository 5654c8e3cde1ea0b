"""Hooks and sinks of a package outside KempnerForge: they are called, and cost no step and no bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.run_files import tensor_digests
from support.runs import Launcher, Run, make_run

pytest_plugins = ["support.run_fixtures"]

PACKAGE = """
import json, os, random, signal

import numpy
import torch
from kempnerforge import Hook, Sink


class Draws:
    def __init__(self):
        self.file = None

    def log(self, *values):
        drawn = [random.random(), torch.rand(1).item(), numpy.random.rand()]
        with open(self.file, "a") as file:
            file.write(json.dumps([*values, drawn]) + "\\n")


class Recorder(Hook, Draws):
    every_rank = True

    def __init__(self, kill_at=0):
        self.kill_at = kill_at

    def on_train_start(self, info):
        self.file = info.run_dir / f"hooks.{info.rank}.jsonl"
        self.is_first = info.attempt == 1
        assert info.num_ranks == 2 and info.job.train.max_steps == 12
        parameters = sum(p.numel() for part in info.model for p in part.parameters())
        self.log("start", info.step, info.attempt, parameters > 0)

    def on_step_end(self, step, metrics):
        try:
            metrics["train/loss"] = 0.0
        except TypeError:
            peak = metrics["memory/host_peak_bytes"]
            self.log("step", step, metrics["step"], metrics["train/loss"], peak > 1e7)
        if step == self.kill_at and self.is_first:
            torch.distributed.barrier()
            os.killpg(0, signal.SIGKILL)
            signal.pause()

    def on_checkpoint_committed(self, step, path, report):
        assert (path / "manifest.json").exists() and report.step == step
        self.log("committed", step)

    def on_eval_end(self, step, metrics):
        self.log("eval", step, metrics["eval/loss"])

    def on_train_end(self, step, reason):
        self.log("end", step, reason)


class Rows(Sink, Draws):
    def start(self, info):
        self.file = info.run_dir / "sink.jsonl"
        self.log("start", info.step)

    def write(self, row):
        self.log("row", dict(row))

    def close(self):
        self.log("close")


class Breaks(Hook):
    error = ValueError

    def __init__(self, method, step=0, rank=0):
        self.every_rank = rank > 0
        if int(os.environ["RANK"]) == rank:
            setattr(self, method, lambda *arguments: self.fail(step, *arguments))

    def on_step_end(self, step, metrics):
        pass

    def fail(self, at, step, *arguments):
        if not isinstance(step, int) or step >= at:
            raise self.error(f"broken at {step}")


class Exits(Breaks):
    error = SystemExit


class BrokenSink(Sink):
    def write(self, row):
        if row["step"] >= 3:
            raise OSError("no server")


def refuses():
    raise RuntimeError("cannot be made")
"""


def plug_in(run: Run, *, hooks: list[dict[str, Any]] | None = None, sinks: list[str] | None = None) -> Run:
    """Write the package into the working directory of ``run``, and name its plug-ins in the config."""
    (run.base / "outside").mkdir()
    (run.base / "outside" / "__init__.py").write_text(PACKAGE)

    def table(values: dict[str, Any]) -> str:
        items = (
            f"{key} = {table(value) if isinstance(value, dict) else json.dumps(value)}"
            for key, value in values.items()
        )
        return "{ " + ", ".join(items) + " }"

    named = ", ".join(table(hook) for hook in hooks or [])
    written = ", ".join(table({"name": name}) for name in sinks or [])
    with run.config.open("a") as file:
        file.write(f"hooks = [{named}]\nmetrics.sinks = [{written}]\n")
    return run


def lines(path: Path) -> list[list[Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_hooks_of_killed_and_resumed_run_change_no_bit(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    plain = make_run(tmp_path / "plain", corpus, **{"checkpoint.save_first": True})
    launcher.finish(plain, ranks=2)
    run = make_run(tmp_path / "hooks", corpus, **{"checkpoint.save_first": True})
    recorder = {"name": "outside:Recorder", "args": {"kill_at": 7}}
    plug_in(run, hooks=[recorder], sinks=["outside:Rows"])
    killed = launcher.run(run, ranks=2)
    assert killed.statuses == [-9, -9], killed.output
    launcher.finish(run, ranks=2)
    assert run.counting() == plain.counting()
    # The generators of both ranks are among the tensors.
    assert tensor_digests(run.step_folder(12)) == tensor_digests(plain.step_folder(12))

    events = [lines(run.folder / f"hooks.{rank}.jsonl") for rank in (0, 1)]
    names = [[event[:2] for event in of_rank] for of_rank in events]
    assert names[0] == names[1]
    again = names[0].index(["start", 4])
    assert names[0][0] == ["start", 0]
    assert [step for name, step in names[0][:again] if name == "step"] == [1, 2, 3, 4, 5, 6, 7]
    assert [step for name, step in names[0][again:] if name == "step"] == [5, 6, 7, 8, 9, 10, 11, 12]
    assert [step for name, step in names[0] if name == "committed"] == [0, 4, 8, 12]
    assert [step for name, step in names[0][again:] if name == "eval"] == [8, 12]
    assert events[0][-1][:3] == ["end", 12, "finished"]
    rows = {row["step"]: row["train/loss"] for row in run.rows() if "train/loss" in row}
    assert all(rows[event[1]] == event[3] and event[4] for event in events[1] if event[0] == "step")
    # What a hook draws differs from step to step and from rank to rank, but not when a step is repeated.
    drawn = [{event[1]: event[-1] for event in of_rank if event[0] == "step"} for of_rank in events]
    assert len({tuple(each) for of_rank in drawn for each in of_rank.values()}) == 24
    repeated = [event[-1] for event in events[0] if event[:2] == ["step", 6]]
    assert repeated[0] == repeated[1]

    sink = lines(run.folder / "sink.jsonl")
    assert [event[:2] for event in sink if event[0] == "start"] == [["start", 0], ["start", 4]]
    assert sink[-1][0] == "close"
    written = [event[1] for event in sink if event[0] == "row"]
    assert written == [{key: value for key, value in row.items() if key != "attempt"} for row in run.rows()]
    assert all("time/hooks_s" in row for row in run.rows() if "train/loss" in row)
    assert not any("time/hooks_s" in row for row in plain.rows())


@pytest.mark.parametrize(
    ("method", "step", "rank", "newest"),
    [
        ("on_train_start", 0, 0, 0),
        pytest.param("on_step_end", 8, 1, 8, marks=pytest.mark.smoke),
        ("on_step_end", 5, 0, 4),
        ("on_checkpoint_committed", 4, 0, 4),
        ("on_checkpoint_committed", 12, 1, 12),
        ("on_eval_end", 4, 1, 4),
        ("on_train_end", 12, 0, 12),
    ],
)
def test_hook_that_raises_ends_run_after_due_save(
    launcher: Launcher, corpus: Path, tmp_path: Path, method: str, step: int, rank: int, newest: int
) -> None:
    mode = "async" if method == "on_step_end" else "disabled"
    settings = {"checkpoint.async_mode": mode, "checkpoint.save_first": method == "on_train_start"}
    run = make_run(tmp_path, corpus, **settings)
    plug_in(run, hooks=[{"name": "outside:Breaks", "args": {"method": method, "step": step, "rank": rank}}])
    ended = launcher.run(run, ranks=2)
    assert ended.statuses == [1, 1], ended.output
    assert run.sound()[0] == newest
    message = f"hook outside:Breaks: {method} raised ValueError: broken at"
    assert ended.output.count(message) == 1, ended.output
    assert message in run.record["last_exit"]["reason"]
    [fault] = (run.folder / "faults").iterdir()
    assert fault.name == f"attempt_00001.rank_{rank:05d}.txt"
    assert "outside/__init__.py" in fault.read_text()


def test_hook_that_exits_is_named_and_run_is_not_finished(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path, corpus)
    plug_in(run, hooks=[{"name": "outside:Exits", "args": {"method": "on_step_end", "step": 5}}])
    ended = launcher.run(run)
    assert ended.statuses == [1], ended.output
    assert "hook outside:Exits: on_step_end raised SystemExit: broken at" in ended.output


def test_hook_with_on_error_warn_trains_on(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, corpus)
    breaks = {"name": "outside:Breaks", "args": {"method": "on_step_end", "step": 3}, "on_error": "warn"}
    plug_in(run, hooks=[breaks])
    ended = launcher.finish(run, ranks=2)
    assert ended.output.count("raised ValueError: broken at 3 (rank 0, ") == 1, ended.output
    assert "on_step_end raised 10 exceptions in all" in ended.output
    assert run.sound() == [12, 8, 4]


@pytest.mark.smoke
def test_sink_that_raises_is_left_out(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, corpus)
    plug_in(run, sinks=["outside:BrokenSink", "outside:refuses", "outside:Rows"])
    ended = launcher.finish(run, ranks=2)
    assert ended.output.count("sink outside:BrokenSink: write raised OSError: no server") == 1
    assert ended.output.count("sink outside:refuses: the constructor raised RuntimeError") == 1
    assert len([event for event in lines(run.folder / "sink.jsonl") if event[0] == "row"]) == len(run.rows())


@pytest.mark.parametrize(
    ("hook", "status", "message"),
    [
        ({"name": "outside:refuses"}, 1, "hook outside:refuses: the constructor raised RuntimeError"),
        ({"name": "outside:Recorder", "args": {"kil_at": 1}}, 2, 'did you mean "kill_at"?'),
    ],
)
def test_hook_that_cannot_be_made_starts_nothing(
    launcher: Launcher, corpus: Path, tmp_path: Path, hook: dict[str, Any], status: int, message: str
) -> None:
    run = make_run(tmp_path, corpus)
    plug_in(run, hooks=[hook])
    ended = launcher.run(run, ranks=2)
    assert ended.statuses == [status, status], ended.output
    assert ended.output.count(message) == 1
    assert run.rows() == []
