"""Real runs whose saves are paced by what they cost and by what has failed."""

from __future__ import annotations

import itertools
import re
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.clock import FakeClock
from support.patch_target import patch_target
from support.runs import Launcher, Run, make_run

from kempnerforge.checkpoint import save_coordinator
from kempnerforge.checkpoint.manager import CheckpointManager
from kempnerforge.checkpoint.results import SaveReport
from kempnerforge.checkpoint.save.writer_client import Writer
from kempnerforge.checkpoint.schedule import overhead as overhead
from kempnerforge.checkpoint.state.train_state import TrainState
from kempnerforge.config.schema import CheckpointConfig
from kempnerforge.goodput.event_log import read_events
from kempnerforge.goodput.interval import daly, expected_mtti

pytest_plugins = ["support.run_fixtures"]

SHORTEST_S = patch_target("kempnerforge.checkpoint.schedule.auto_interval:SHORTEST_S")

STEPS = 40
NEWS = r"checkpoint interval: (.+) \(auto: (.+), (.+)\)"
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


def test_overhead_counts_slowed_steps_not_only_the_call(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    # No validation: the steps, and not a validation behind a save, have to be what waits for the shards.
    run = make_run(tmp_path, corpus, **SETTINGS | {"checkpoint.interval": 15, "eval.interval": 0})
    ended = launcher.run(run, faults=[("contended_shards", {"seconds": 1.0, "rank": None})])
    assert ended.statuses == [0], ended.output
    first, last = (row for row in commits(run) if row["checkpoint/lag_steps"])
    for row in (first, last):
        assert not row["checkpoint/overhead_is_lower_bound"]
        assert row["checkpoint/overhead_s"] > row["checkpoint/blocking_s"], "the step behind the call waited"
    # The percentage is of the time since the loop began: behind the receipt, before the first row.
    (receipt,) = run.receipts()
    longest_s = first["time"] - receipt["time"]
    shortest_s = began(run)[first["checkpoint/step"]] - min(began(run).values())
    overhead_s = first["checkpoint/overhead_s"]
    assert 100 * overhead_s / longest_s <= first["checkpoint/overhead_pct"] <= 100 * overhead_s / shortest_s
    in_ledger = [event["tax_s"] for event in read_events(run.folder) if event["event"] == "commit"]
    assert in_ledger[0] == overhead_s


def test_auto_interval_spacing_follows_formula(
    launcher: Launcher, corpus: Path, tmp_path: Path, plain: Run
) -> None:
    prior_s = 3.6
    pace = {"checkpoint.max_overhead_pct": 100.0, "checkpoint.expected_mtti_hours": prior_s / 3600}
    pace["checkpoint.save_last"] = False  # its cost would count in the interval of a save that ends with it
    longer = {"train.max_steps": 2 * STEPS, "checkpoint.interval": "auto"}
    run = make_run(tmp_path, corpus, **SETTINGS | pace | longer)
    shortest = ("set_value", {"target": SHORTEST_S, "value": 0.0})
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
        costs = (("overhead_s", "ended_s"), ("blocking_s", "blocked_s"))
        saves = [overhead.SaveCost(**{to: one[f"checkpoint/{key}"] for key, to in costs}) for one in known]
        cost_s = overhead.cost_s(saves)
        assert cost_s is not None
        # The loop began before its first row; the longer it lasts, the longer the interval that is wanted.
        elapsed_s = done[row["step"]] - min(done.values())
        wanted_s = daly(cost_s, expected_mtti(0, elapsed_s, prior_s=prior_s))
        floor_s = statistics.median(one["checkpoint/total_s"] for one in known)
        assert max(wanted_s, floor_s) <= row["checkpoint/interval_s"] * (1 + 1e-9)
    for row, later in itertools.pairwise(auto):
        # A save begins behind the row of its step and before the row of the next one.
        after = later["checkpoint/step"] + 1
        next_done = done[after] if after in done else later["time"]
        assert next_done - done[row["checkpoint/step"]] >= row["checkpoint/interval_s"]
    found = {step: values for step, values in run.counting().items() if step <= STEPS}
    assert found == plain.counting(), "when saves happen changes no loss"


def test_auto_interval_failures_shorten_it(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    pace = {"checkpoint.interval": "auto", "checkpoint.max_overhead_pct": 100.0}
    run = make_run(tmp_path, corpus, **SETTINGS | pace | {"train.max_steps": 100_000, "eval.interval": 0})
    reported = []
    for attempt_number in (1, 2, 3):
        attempt = launcher.start(run, ranks=2)
        deadline = time.monotonic() + 120
        while not (found := re.findall(NEWS, attempt.output())):
            assert time.monotonic() < deadline, attempt.output()
            time.sleep(0.02)
        reported.append(found[0])
        while run.rows()[-1]["attempt"] != attempt_number or run.rows()[-1]["step"] < 14:
            assert time.monotonic() < deadline, attempt.output()
            time.sleep(0.02)
        attempt.kill()
        attempt.wait()
    assert [failures for _, _, failures in reported] == [
        f"one failure in {hours:.1f} h expected" for hours in (24, 12, 8)
    ]
    assert run.committed()[0] == 9, "each attempt saves as soon as there are quiet steps to measure beside"


def test_interval_expensive_save_stretches_on_all_ranks(
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
    assert regular[0]["checkpoint/overhead_s"] > regular[0]["checkpoint/blocking_s"], (
        "rank 0 waits for rank 1"
    )
    assert all(row["checkpoint/step"] % 4 == 0 for row in regular)
    assert len(regular) < STEPS / 4 - 2
    for row, later in itertools.pairwise(regular):
        gap_s = done[later["checkpoint/step"]] - done[row["checkpoint/step"]]
        assert gap_s > row["checkpoint/overhead_s"], row
    assert saved[-1]["checkpoint/step"] == STEPS
    assert run.counting() == plain.counting()


QUIET_STEP_S, SLOWED_STEP_S, WRITE_S = 0.05, 0.1, 0.16


@pytest.mark.smoke
@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_interval_of_user_loop_is_measured_and_paced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    clock = FakeClock().replace_in(monkeypatch, overhead, save_coordinator)
    write, ended = Writer.write, threading.Event()
    model = torch.nn.Linear(8, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    state = TrainState(model=model, optimizer=optimizer)

    def slow_write(*args: Any, **more: Any) -> Any:
        if mode == "disabled":
            clock.now += WRITE_S
        else:  # the loop has to do some steps beside it
            until, deadline = state.step + 3, time.monotonic() + 60
            while state.step < until and not ended.is_set():
                assert time.monotonic() < deadline, "the loop does not advance"
                time.sleep(0.001)
        return write(*args, **more)

    monkeypatch.setattr(Writer, "write", slow_write)
    config = CheckpointConfig.model_validate(
        {"interval": 1, "async_mode": mode, "max_overhead_pct": 50.0, "save_last": False}
    )
    ckpt = CheckpointManager(config, state=state, run_dir=tmp_path)
    ckpt.resume(state)
    reports: list[SaveReport] = []
    slowed, done_at = set(), {}
    deadline = time.monotonic() + 60
    while len(reports) < 4:
        assert time.monotonic() < deadline, f"at step {state.step}: {reports}"
        model(torch.randn(4, 8)).square().mean().backward()
        ckpt.wait_for_staging()
        optimizer.step()
        optimizer.zero_grad()
        if ckpt.in_flight is not None:
            slowed.add(state.step)
        clock.now += SLOWED_STEP_S if state.step in slowed else QUIET_STEP_S
        state.advance()
        done_at[state.step] = clock.now
        reports += ckpt.after_step(state)
    ended.set()
    ckpt.finish(state)
    ckpt.close()
    assert reports[0].step == 9, "quiet steps come first: a bound needs a measure"
    assert not any(report.overhead_is_lower_bound for report in reports)
    for report in reports:
        if mode == "async":
            beside = slowed & set(range(report.step, report.step + report.lag_steps))
            assert len(beside) == report.lag_steps >= 3
            assert report.overhead_s == pytest.approx(len(beside) * (SLOWED_STEP_S - QUIET_STEP_S))
            assert report.blocking_s == 0
        else:
            assert report.overhead_s == pytest.approx(WRITE_S)
            assert report.overhead_s == report.blocking_s
        assert report.overhead_pct > 0
    for place, (report, later) in enumerate(itertools.pairwise(reports)):
        assert report.interval_s is not None
        cost_s = overhead.cost_s([overhead.SaveCost(ended_s=one.overhead_s) for one in reports[: place + 1]])
        assert cost_s is not None
        assert report.interval_s >= 2 * cost_s - 1e-9, "saves take at most half of the time"
        if not later.deferred:  # it was not due already while the other one was written
            assert done_at[later.step] - done_at[report.step] >= report.interval_s
