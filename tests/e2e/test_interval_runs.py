"""Real runs whose saves are paced by what they cost and by what has failed."""

from __future__ import annotations

import itertools
import re
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import Launcher, Run, make_run

from kempnerforge.checkpoint.manager import CheckpointManager
from kempnerforge.checkpoint.report import SaveReport
from kempnerforge.checkpoint.state import TrainState
from kempnerforge.checkpoint.writer import Writer
from kempnerforge.config.schema import CheckpointConfig
from kempnerforge.goodput.interval import daly, expected_mtti
from kempnerforge.goodput.ledger import read_events

pytest_plugins = ["support.run_fixtures"]

STEPS = 40
TOLD = r"checkpoint interval: (.+) \(auto: (.+), (.+)\)"
UNITS = {"s": 1, "min": 60, "h": 3600}
SETTINGS = {"train.max_steps": STEPS, "eval.interval": 10, "checkpoint.async_mode": "async"}


@pytest.fixture(scope="module")
def plain(launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run without saves."""
    never = {"checkpoint.interval": 0, "checkpoint.save_last": False}
    run = make_run(tmp_path_factory.mktemp("plain"), corpus, **SETTINGS, **never)
    launcher.finish(run, ranks=2)
    return run


def commits(run: Run) -> list[dict[str, Any]]:
    return [row for row in run.rows() if "checkpoint/step" in row]


def began(run: Run) -> dict[int, float]:
    """Step -> when it was done, which is when a save of it began."""
    return {row["step"]: row["time"] for row in run.rows() if "train/loss" in row or "eval/loss" in row}


def test_the_overhead_is_what_slowed_steps_cost_and_not_the_call(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path, corpus, **SETTINGS | {"checkpoint.interval": 15})
    ended = launcher.run(run, faults=[("contended_shards", {"seconds": 1.0, "rank": None})])
    assert ended.statuses == [0], ended.output
    first, last = (row for row in commits(run) if row["checkpoint/lag_steps"])
    for row in (first, last):
        assert not row["checkpoint/tax_is_lower_bound"]
        assert row["checkpoint/tax_s"] > 3 * row["checkpoint/blocking_s"]
        assert row["checkpoint/tax_s"] > 0.5, "the call returned at once, the step behind it took a second"
    elapsed_s = first["time"] - min(began(run).values())
    call_pct = 100 * first["checkpoint/blocking_s"] / elapsed_s
    assert first["checkpoint/overhead_pct"] > 2 * call_pct
    told = [event["tax_s"] for event in read_events(run.folder) if event["event"] == "commit"]
    assert told[0] == first["checkpoint/tax_s"]


def test_auto_saves_at_a_spacing_that_follows_the_formula(
    launcher: Launcher, corpus: Path, tmp_path: Path, plain: Run
) -> None:
    prior_s = 3.6
    pace = {"checkpoint.max_overhead_pct": 100.0, "checkpoint.expected_mtti_hours": prior_s / 3600}
    pace["checkpoint.save_last"] = False  # its cost would count in the interval of a save that ends with it
    run = make_run(tmp_path, corpus, **SETTINGS, **pace, **{"checkpoint.interval": "auto"})
    shortest = ("set_value", {"target": "kempnerforge.checkpoint.pace:SHORTEST_S", "value": 0.0})
    ended = launcher.run(run, ranks=2, faults=[shortest])
    assert ended.statuses == [0, 0], ended.output
    assert "checkpoint interval: " in ended.outputs[0]
    assert "checkpoint interval: " not in ended.outputs[1], "rank 0 speaks"
    auto = [row for row in commits(run) if row["checkpoint/reason"] == "auto"]
    assert auto[0]["checkpoint/step"] == 9, "as soon as there were quiet steps to measure beside"
    assert len(auto) >= 2
    done = began(run)
    for place, row in enumerate(auto):
        known = auto[: place + 1][-8:]
        cost_s = max(
            statistics.fmean(one[f"checkpoint/{key}"] for one in known) for key in ("tax_s", "blocking_s")
        )
        elapsed_s = row["time"] - min(done.values())
        wanted_s = daly(cost_s, expected_mtti(0, elapsed_s, prior_s=prior_s))
        floor_s = statistics.fmean(one["checkpoint/total_s"] for one in known)
        # Since the loop began is a little longer than since its first row; it falls by a fifth or not at all.
        assert 0.95 * max(wanted_s, floor_s) < row["checkpoint/interval_s"]
    for row, later in itertools.pairwise(auto):
        gap_s = done[later["checkpoint/step"]] - done[row["checkpoint/step"]]
        assert gap_s > 0.95 * row["checkpoint/interval_s"] - 0.05
    assert run.counting() == plain.counting(), "when saves happen changes no loss"


def test_failures_make_the_interval_shorter(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    pace = {"checkpoint.interval": "auto", "checkpoint.max_overhead_pct": 100.0}
    run = make_run(tmp_path, corpus, **SETTINGS | pace | {"train.max_steps": 100_000, "eval.interval": 0})
    told = []
    for attempt_number in (1, 2, 3):
        attempt = launcher.start(run, ranks=2)
        deadline = time.monotonic() + 50
        while not (found := re.findall(TOLD, attempt.output())):
            assert time.monotonic() < deadline, attempt.output()
            time.sleep(0.02)
        told.append(found[0])
        while run.rows()[-1]["attempt"] != attempt_number or run.rows()[-1]["step"] < 14:
            assert time.monotonic() < deadline, attempt.output()
            time.sleep(0.02)
        attempt.kill()
        attempt.wait()
    assert [failures for _, _, failures in told] == [
        f"one failure in {hours:.1f} h expected" for hours in (24, 12, 8)
    ]
    intervals_s = [float(number) * UNITS[unit] for number, unit in (one.split() for one, _, _ in told)]
    assert intervals_s[0] > 1.2 * intervals_s[1] > 1.3 * intervals_s[2]
    assert len({cost for _, cost, _ in told}) == 1, "no save since the first: its cost is remembered"
    assert run.committed() == [9]


def test_an_expensive_save_stretches_the_interval_for_all_ranks_alike(
    launcher: Launcher, corpus: Path, tmp_path: Path, plain: Run
) -> None:
    pace = {"checkpoint.interval": 4, "checkpoint.max_overhead_pct": 10.0}
    run = make_run(tmp_path, corpus, **SETTINGS, **pace)
    ended = launcher.run(run, ranks=2, faults=[("slow_staging", {"seconds": 0.8, "rank": 1})])
    assert ended.statuses == [0, 0], ended.output
    assert re.search(r"stretched to .* s \(a save costs .*max_overhead_pct is 10\)", ended.outputs[0])
    saved, done = commits(run), began(run)
    regular = [row for row in saved if row["checkpoint/reason"] == "interval"]
    assert regular[0]["checkpoint/step"] == 12
    assert regular[0]["checkpoint/tax_s"] > 0.2, "rank 0 waits for rank 1"
    assert all(row["checkpoint/step"] % 4 == 0 for row in regular)
    assert len(regular) < STEPS / 4 - 2
    for row, later in itertools.pairwise(regular):
        gap_s = done[later["checkpoint/step"]] - done[row["checkpoint/step"]]
        assert gap_s > row["checkpoint/tax_s"], row
    assert saved[-1]["checkpoint/step"] == STEPS
    assert run.counting() == plain.counting()


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_loop_of_ones_own_is_measured_and_paced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    slow_s, write = 0.15, Writer.write

    def slow_write(*args: Any, **more: Any) -> Any:
        time.sleep(slow_s)
        return write(*args, **more)

    monkeypatch.setattr(Writer, "write", slow_write)
    model = torch.nn.Linear(8, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    state = TrainState(model=model, optimizer=optimizer)
    config = CheckpointConfig.model_validate(
        {"interval": 1, "async_mode": mode, "max_overhead_pct": 50.0, "save_last": False}
    )
    ckpt = CheckpointManager(config, state=state, run_dir=tmp_path)
    ckpt.resume(state)
    reports: list[SaveReport] = []
    slowed_s: dict[int, float] = {}
    for _ in range(60):
        model(torch.randn(4, 8)).square().mean().backward()
        ckpt.wait_for_staging()
        optimizer.step()
        optimizer.zero_grad()
        beside = ckpt.in_flight is not None and mode == "async"
        time.sleep(0.1 if beside else 0.005)
        if beside:
            slowed_s[state.step] = 0.095
        state.advance()
        reports += ckpt.after_step(state)
    ckpt.finish(state)
    ckpt.close()
    first = reports[0]
    assert first.step == 9, "quiet steps come first: a bound needs a measure"
    assert not first.tax_is_lower_bound
    if mode == "async":
        expected_s = sum(slowed_s.get(first.step + step, 0.0) for step in range(first.lag_steps))
        assert first.tax_s > 0.5 * expected_s > first.blocking_s / 10
    else:
        assert first.tax_s == first.blocking_s >= slow_s
    assert len(reports) < 45, "some steps were not saved"
    assert all(report.overhead_pct > 0 for report in reports)
    assert all(report.interval_s is not None and report.interval_s > 0 for report in reports)
