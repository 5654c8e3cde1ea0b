"""The campaign of kills: what it measures, what its reference does, and that it leaves nothing running."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_goodput
import pytest
from bench import arms
from bench import reference_loop as reference
from bench.goodput_arithmetic import (
    PARTS,
    Cost,
    clean_steps_s,
    cost_of,
    exponential_ratio,
    first_order_ratio,
    lost_committed_steps,
    lost_steps,
    parts_of,
    projected_ratio,
    wrong_losses,
)
from bench.kills import MARK, Attempt, BenchError, Job, marked, run_to_end, started
from support.ranks import run_ranks

from kempnerforge.config.schema import load_job
from kempnerforge.train.book import AttemptBook

REPO = Path(__file__).parents[2]


def attempt(
    launched: float, ended: float, steps: dict[int, float], *, killed: bool = True, newest: int = 0
) -> Attempt:
    """``steps``: when each was done. Its loss is a tenth of its number."""
    one = Attempt(launched, newest, ended, ended - launched if killed else None)
    one.steps = [(seen, step, step / 10) for step, seen in steps.items()]
    return one


# Killed in its set-up; killed at step 5 and gone on from at 3; done.
KILLED = [
    attempt(0, 4, {}),
    attempt(5, 21.5, {1: 11, 2: 12, 3: 15, 4: 18, 5: 21}),
    attempt(22.5, 37, {4: 30, 5: 31, 6: 34}, killed=False, newest=3),
]


def test_the_parts_of_a_killed_run_sum_to_its_wall_time() -> None:
    parts = parts_of(KILLED, step_s=1.0)
    assert parts == {
        "steps": 6.0,
        "saving": 15 - 10 - 3 + 34 - 29 - 3,
        "redo": 21.5 - 15,
        "restart": 4 + (10 - 5) + (29 - 22.5),
        "ending": 3.0,
        "delay": 2.0,
    }
    assert tuple(parts) == PARTS
    assert sum(parts.values()) == 37
    assert lost_steps(KILLED) == 2


def test_a_run_that_was_killed_after_its_last_step_is_whole() -> None:
    run = [attempt(0, 9, {1: 6, 2: 7}), attempt(10, 14, {}, killed=False, newest=2)]
    parts = parts_of(run, step_s=1.0)
    assert (parts["steps"], parts["redo"], parts["restart"], parts["delay"]) == (2, 2, 5 + 4, 1)
    assert (lost_steps(run), lost_committed_steps(run)) == (0, 0)
    assert wrong_losses(run, attempt(0, 9, {1: 6, 2: 7})) == []


def test_a_committed_step_that_was_not_gone_on_from_is_counted() -> None:
    assert lost_committed_steps(KILLED) == 0
    assert lost_committed_steps([*KILLED[:2], attempt(22.5, 37, {4: 30, 5: 31}, newest=5)]) == 2


def test_every_loss_is_compared_also_those_of_lost_steps() -> None:
    undisturbed = attempt(0, 9, dict.fromkeys(range(1, 7), 1.0), killed=False)
    assert wrong_losses(KILLED, undisturbed) == []
    assert wrong_losses(KILLED[:2], undisturbed) == [6], "a missing one"
    other = attempt(5, 21.5, {1: 11, 2: 12, 3: 15, 4: 18, 5: 21})
    other.steps[4] = (21, 5, 0.5000000000000001)
    assert wrong_losses([other, KILLED[2]], undisturbed) == [5]


def test_costs_come_from_an_undisturbed_run() -> None:
    seen = {1: 5.0, 2: 6.0, 3: 8.5, 4: 9.5, 5: 12.0, 6: 13.0}
    run = attempt(1, 20, seen, killed=False)
    for step, at in (
        (2, 7.5),
        (4, 11.0),
        (6, 19.0),
    ):  # each blocks for 1.5 s; the one after the end does not count
        run.saves.append({"step": step, "seen": at, "blocking_s": 1.5, "total_s": 1.75})
    assert cost_of(run, blocking_is_lag=False) == Cost(1.0, 1.5, 1.5, 0.25, 3.0)
    assert cost_of(run, blocking_is_lag=True).lag_s == 0
    assert clean_steps_s(run) == [1.0, 1.0, 1.0], "2 to 3 and 4 to 5 had a save beside them"
    run.saves = run.saves[-1:]
    with pytest.raises(ValueError, match="needs saves"):
        cost_of(run, blocking_is_lag=True)


def test_the_first_order_formula_is_that_of_the_text() -> None:
    cost = Cost(step_s=1, stall_s=2, blocking_s=2, lag_s=3, restart_s=30)
    found = first_order_ratio(cost, interval_s=40, mtti_s=990, delay_s=10)
    assert found == pytest.approx((1 - (30 + 10 + 3 + 20) / 1000) / (1 + 2 / 40))


def test_a_dearer_save_and_more_failures_cost_more() -> None:
    cost = Cost(step_s=1, stall_s=0.4, blocking_s=0.4, lag_s=0, restart_s=8)

    def ratio(scale: float, mtti_s: float) -> float:
        return projected_ratio(cost, scale=scale, restart_s=100, mtti_s=mtti_s)

    # Daly's interval for 40 s is 860 s: (1 - (100 + 430) / 10,000) / (1 + 40 / 860), in first order.
    assert ratio(100, 10_000) == pytest.approx(0.905, abs=0.005)
    assert ratio(100, 10_000) < ratio(1, 10_000) < ratio(1, 100_000) < 1


@pytest.mark.parametrize("mtti_s", [30.0, 300.0])
def test_the_model_is_what_a_simulation_of_kills_gives(mtti_s: float) -> None:
    cost = Cost(step_s=1, stall_s=0.5, blocking_s=0.5, lag_s=1, restart_s=8)
    drawn = random.Random(0)
    kept_s = wall_s = 0.0
    for _ in range(100_000):
        lived_s = drawn.expovariate(1 / mtti_s)
        kept_s += 5 * max(0, int((lived_s - cost.restart_s - cost.lag_s) / (5 + cost.stall_s)))
        wall_s += lived_s + 2
    expected = exponential_ratio(cost, interval_s=5, mtti_s=mtti_s, delay_s=2)
    assert kept_s / wall_s == pytest.approx(expected, rel=0.02)
    first_order = first_order_ratio(cost, interval_s=5, mtti_s=mtti_s, delay_s=2)
    assert (abs(first_order / expected - 1) < 0.01) == (mtti_s == 300), "good where failures are rare"


def test_the_same_seed_gives_the_same_kills() -> None:
    first, again = (list(bench_goodput.kill_gaps(3, 20.0, 5)) for _ in range(2))
    assert first == again
    assert first != list(bench_goodput.kill_gaps(4, 20.0, 5))
    many = list(itertools.islice(bench_goodput.kill_gaps(3, 20.0, 0), 20_000))
    assert many[:5] == first
    assert sum(many) / len(many) == pytest.approx(20, rel=0.03)


def test_a_last_checkpoint_of_other_bytes_is_found(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for run in (one, other):
        step = run / "checkpoints" / "step_00000007"
        step.mkdir(parents=True)
        for name in ("shard_00000", "shard_00001", "manifest.json"):
            (step / name).write_text(name)
    (step / "manifest.json").write_text("another time")
    assert arms.differing_files(one, other, 7) == []
    (step / "shard_00001").write_text("shard_0000!")
    (step / "shard_00002").write_text("one more")
    assert arms.differing_files(one, other, 7) == ["shard_00001", "shard_00002"]


# Jobs that are no training: they count.

COUNTER = """
import json, os, subprocess, sys, time
rows, steps = sys.argv[1], int(sys.argv[2])
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
done = [json.loads(line)["checkpoint/step"] for line in open(rows)] if os.path.exists(rows) else []
time.sleep(0.3)
with open(rows, "a") as out:
    for step in range(max(done, default=0) + 1, steps + 1):
        time.sleep(0.02)
        saved = {"checkpoint/step": step, "checkpoint/blocking_s": 0, "checkpoint/total_s": 0}
        print(json.dumps({"step": step, "train/loss": step / 10, **saved}), file=out, flush=True)
sys.exit(steps == 99)
"""


def counting_job(folder: Path, steps: int, *, num_ranks: int = 1) -> Job:
    rows = folder / "rows.jsonl"

    def newest() -> int:
        return len(rows.read_text().splitlines()) if rows.exists() else 0

    program = ["-c", COUNTER, str(rows), str(steps)]
    return Job("a counter", program, rows, folder / "log", newest, num_ranks, launcher="ranks")


def test_a_job_is_killed_when_the_gaps_say_and_goes_on_until_it_is_done(tmp_path: Path) -> None:
    gaps = [0.6, 0.01, 0.5]
    attempts = run_to_end(counting_job(tmp_path, 30), iter(gaps), delay_s=0.05)
    killed_after_s = [one.killed_after_s for one in attempts]
    assert killed_after_s[-1] is None or len(attempts) == 4
    for planned_s, found_s in zip(gaps, killed_after_s, strict=False):
        assert found_s is None or found_s >= planned_s
    assert attempts[1].steps == [], "killed before its first step"
    assert attempts[-1].last_step == 30
    for number, (before, after) in enumerate(itertools.pairwise(attempts), 1):
        assert after.launched - before.ended >= 0.05
        assert after.newest_before == max((one.last_step or 0) for one in attempts[:number])
    assert lost_committed_steps(attempts) == 0
    wall_s = attempts[-1].ended - attempts[0].launched
    assert sum(parts_of(attempts, step_s=0.02).values()) == pytest.approx(wall_s)


def test_a_job_that_fails_by_itself_is_an_error_with_what_it_said(tmp_path: Path) -> None:
    program = ["-c", "import sys; sys.exit('no such luck')"]
    job = Job("a job", program, tmp_path / "rows.jsonl", tmp_path / "log", lambda: 0, 1, "ranks")
    with pytest.raises(BenchError, match=r"(?s)a job failed with status \[1\].*no such luck") as caught:
        run_to_end(job, iter(()), delay_s=0)
    assert str(tmp_path / "log") in str(caught.value)


def test_an_unknown_launcher_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    job = replace(counting_job(tmp_path, 3), launcher="mpirun")
    with pytest.raises(BenchError, match="no launcher 'mpirun'; there are torchrun, ranks"):
        run_to_end(job, iter(()), delay_s=0)


def test_all_processes_of_a_job_are_gone_when_the_bench_is_interrupted(tmp_path: Path) -> None:
    mark = ""

    def run_until_interrupted() -> None:
        nonlocal mark
        with started(counting_job(tmp_path, 100_000, num_ranks=2)) as processes:
            environment = Path(f"/proc/{processes[0].pid}/environ").read_bytes().split(b"\0")
            (mark,) = (one.decode()[len(MARK) + 1 :] for one in environment if one.startswith(MARK.encode()))
            while len(marked(mark)) < 4:  # two ranks, and the child of each in a session of its own
                time.sleep(0.01)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_until_interrupted()
    assert len(mark) == 32
    assert marked(mark) == []


# The reference


def losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines() if line]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def reference_runs(config: Path, folder: Path) -> tuple[list[int], list[int], int]:
    """A run to step 6, and one that was killed while it saved step 5; the steps that attempts began at."""
    import torch

    def run(name: str, steps: int) -> int:
        loop = reference.Loop(load_job(str(config), [], world_size=2).job, folder / name, torch.device("cpu"))
        loop.resume()
        began_at = loop.step
        loop.train(steps, 2)
        return began_at

    began_at = [run("whole", 6), run("killed", 5)]
    saved = reference.saved_steps(folder / "whole")
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        (reference.step_folder(folder / "killed", 5) / ".metadata").unlink()
    torch.distributed.barrier()
    newest = arms.newest_of_reference(folder / "killed" / "checkpoints")
    return [*began_at, run("killed", 6)], saved, newest


def test_the_reference_goes_on_from_its_newest_complete_save_with_the_same_bits(tmp_path: Path) -> None:
    given = argparse.Namespace(**{**arms.SIZES["tiny"], "steps": 6})
    config = arms.prepare_inputs(tmp_path, given)
    assert run_ranks(reference_runs, 2, config, tmp_path) == [([0, 0, 4], [4, 6], 4)] * 2
    whole = losses(tmp_path / "whole")
    assert sorted(whole) == [1, 2, 3, 4, 5, 6]
    assert len(set(whole.values())) == 6
    assert losses(tmp_path / "killed") == whole


# The whole, with the smallest jobs: eight starts of Python and torch, minutes on a machine that is busy

patient = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    ended = subprocess.run(
        [sys.executable, str(REPO / "scripts/bench_goodput.py"), "--size", "tiny", "--json", "out.json"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=560,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert [path.name for path in folder.iterdir()] == ["out.json"], "it cleans up"
    assert "losses and last checkpoint bitwise those of the undisturbed run" in ended.stdout
    return json.loads((folder / "out.json").read_text())


@patient
def test_both_arms_are_killed_at_the_same_times_and_do_all_the_work(tiny: dict[str, Any]) -> None:
    found = {name: arm["campaigns"][0] for name, arm in tiny["arms"].items()}
    assert list(found) == ["ours", "reference"]
    steps = tiny["arguments"]["steps"]
    for name, one in found.items():
        assert one["planned_kills_s"] == found["ours"]["planned_kills_s"]
        assert len(one["killed_after_s"]) == one["kills"] == 2
        assert all(
            killed >= planned
            for killed, planned in zip(one["killed_after_s"], one["planned_kills_s"], strict=True)
        )
        assert (one["wrong_losses"], one["differing_shards"], one["lost_committed_steps"]) == ([], [], 0)
        assert one["saved_steps"][-1][-1] == steps, "the last step is saved"
        assert sum(one[f"{part}_s"] for part in PARTS) == pytest.approx(one["wall_s"])
        assert {step for _, step, _ in tiny["undisturbed"][name]["steps"]} == set(range(1, steps + 1))
        for begun in one["attempts"]:
            assert not begun["steps"] or begun["steps"][0][1] == begun["newest_before"] + 1
    assert {row["name"] for row in tiny["comparisons"]} >= {"effective", "wall_s", "restart_s"}
    for arm in tiny["arms"].values():
        assert 0 < arm["predicted"]["exponential"] < 1
        assert arm["cost"]["restart_s"] > 0


@patient
def test_both_arms_train_the_same_and_the_reference_waits_for_its_saves(tiny: dict[str, Any]) -> None:
    ours, other = (tiny["undisturbed"][name] for name in ("ours", "reference"))
    for (_, step, loss), (_, other_step, other_loss) in zip(ours["steps"], other["steps"], strict=True):
        assert step == other_step
        assert loss == pytest.approx(other_loss, rel=1e-4), f"step {step}"
    assert all(save["blocking_s"] == save["total_s"] for save in other["saves"])
    assert len(other["saves"]) == len({save["step"] for save in other["saves"]}) >= 8


@patient
def test_the_ledger_agrees_with_what_is_seen_from_outside(tiny: dict[str, Any]) -> None:
    (one,) = tiny["arms"]["ours"]["campaigns"]
    told = one["ledger"]
    started_s = [begun["steps"][0][0] - begun["launched"] for begun in one["attempts"] if begun["steps"]]
    assert told["parts_s"]["setup"] >= 0.7 * sum(started_s), "imports are most of a start"
    assert told["restart_and_delay_s"] <= one["restart_s"] + one["delay_s"] + told["unseen_s"] + 1
    assert told["lost_steps"] <= one["lost_steps"] + 1, "a step is in the ledger before its row is written"


def test_an_attempt_begins_with_its_launcher_unless_that_starts_its_ranks_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert AttemptBook()._setup_s["launch"] > 0, "this process has imported something"

    def begun(environ: Mapping[str, str] = os.environ) -> float:
        return 10.0 if "TORCHELASTIC_RUN_ID" in environ else 20.0

    monkeypatch.setattr("kempnerforge.train.book.attempt_started", begun)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert AttemptBook()._started == 10.0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert AttemptBook()._started == 20.0
