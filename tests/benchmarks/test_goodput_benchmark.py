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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import bench_goodput
import pytest
import torch
from bench import arms, kills
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
from support.polling import wait_until
from support.ranks import run_ranks

from kempnerforge.checkpoint.run.metadata import RunRecord
from kempnerforge.config.schema import load_job
from kempnerforge.distributed.consensus import ControlGroup
from kempnerforge.distributed.context import DistributedContext
from kempnerforge.goodput.event_log import read_events
from kempnerforge.goodput.run_history import RunHistory
from kempnerforge.train import attempt_recorder
from kempnerforge.train.attempt_recorder import AttemptRecorder

REPO = Path(__file__).parents[2]


def attempt(
    launched: float, ended: float, steps: dict[int, float], *, killed: bool = True, newest: int = 0
) -> Attempt:
    """``steps``: when each was done. Its loss is a tenth of its number."""
    one = Attempt(launched, newest, ended, ended - launched if killed else None)
    one.steps = [(seen, step, step / 10) for step, seen in steps.items()]
    return one


# Killed in its set-up; killed at step 5 and resumed from step 3; done.
KILLED = [
    attempt(0, 4, {}),
    attempt(5, 21.5, {1: 11, 2: 12, 3: 15, 4: 18, 5: 21}),
    attempt(22.5, 37, {4: 30, 5: 31, 6: 34}, killed=False, newest=3),
]


def test_parts_of_killed_run_sum_to_wall_time() -> None:
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


def test_parts_killed_after_last_step_nothing_lost() -> None:
    run = [attempt(0, 9, {1: 6, 2: 7}), attempt(10, 14, {}, killed=False, newest=2)]
    parts = parts_of(run, step_s=1.0)
    assert (parts["steps"], parts["redo"], parts["restart"], parts["delay"]) == (2, 2, 5 + 4, 1)
    assert (lost_steps(run), lost_committed_steps(run)) == (0, 0)
    assert wrong_losses(run, attempt(0, 9, {1: 6, 2: 7})) == []


def test_lost_committed_steps_not_resumed_is_counted() -> None:
    assert lost_committed_steps(KILLED) == 0
    assert lost_committed_steps([*KILLED[:2], attempt(22.5, 37, {4: 30, 5: 31}, newest=5)]) == 2


def test_wrong_losses_compares_lost_steps_too() -> None:
    undisturbed = attempt(0, 9, dict.fromkeys(range(1, 7), 1.0), killed=False)
    assert wrong_losses(KILLED, undisturbed) == []
    assert wrong_losses(KILLED[:2], undisturbed) == [6], "a missing one"
    other = attempt(5, 21.5, {1: 11, 2: 12, 3: 15, 4: 18, 5: 21})
    other.steps[4] = (21, 5, 0.5000000000000001)
    assert wrong_losses([other, KILLED[2]], undisturbed) == [5]


def test_cost_of_undisturbed_run_matches() -> None:
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


def test_first_order_ratio_known_case_matches() -> None:
    cost = Cost(step_s=1, stall_s=2, blocking_s=2, lag_s=3, restart_s=30)
    found = first_order_ratio(cost, interval_s=40, mtti_s=990, delay_s=10)
    assert found == pytest.approx((1 - (30 + 10 + 3 + 20) / 1000) / (1 + 2 / 40))


def test_projected_ratio_dearer_save_is_lower() -> None:
    cost = Cost(step_s=1, stall_s=0.4, blocking_s=0.4, lag_s=0, restart_s=8)

    def ratio(scale: float, mtti_s: float) -> float:
        return projected_ratio(cost, scale=scale, restart_s=100, mtti_s=mtti_s)

    # Daly's interval for 40 s is 860 s: (1 - (100 + 430) / 10,000) / (1 + 40 / 860), in first order.
    assert ratio(100, 10_000) == pytest.approx(0.905, abs=0.005)
    assert ratio(100, 10_000) < ratio(1, 10_000) < ratio(1, 100_000) < 1


@pytest.mark.parametrize("mtti_s", [30.0, 300.0])
def test_exponential_ratio_matches_simulated_kills(mtti_s: float) -> None:
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


def test_kill_gaps_same_seed_same_kills() -> None:
    first, again = (list(bench_goodput.kill_gaps(3, 20.0, 5)) for _ in range(2))
    assert first == again
    assert first != list(bench_goodput.kill_gaps(4, 20.0, 5))
    many = list(itertools.islice(bench_goodput.kill_gaps(3, 20.0, 0), 20_000))
    assert many[:5] == first
    assert sum(many) / len(many) == pytest.approx(20, rel=0.03)


def test_differing_files_other_bytes_are_found(tmp_path: Path) -> None:
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
rows, starts, steps, stops = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
done = [json.loads(line)["checkpoint/step"] for line in open(rows)] if os.path.exists(rows) else []
start = len(os.listdir(starts))
until = stops[start] if start < len(stops) else steps
with open(rows, "a") as out:
    for step in range(max(done, default=0) + 1, until + 1):
        time.sleep(0.001)
        saved = {"checkpoint/step": step, "checkpoint/blocking_s": 0, "checkpoint/total_s": 0}
        print(json.dumps({"step": step, "train/loss": step / 10, **saved}), file=out, flush=True)
if start < len(stops):
    open(os.path.join(starts, str(start)), "w").close()
    time.sleep(600)
"""


def counting_job(folder: Path, steps: int, *, stops: Sequence[int] = (), num_ranks: int = 1) -> Job:
    """A job that counts to ``steps``; its n-th start counts to the n-th of ``stops`` and hangs there.

    Each start that hangs leaves a file in ``starts``.
    """
    rows, starts = folder / "rows.jsonl", folder / "starts"
    starts.mkdir()

    def newest() -> int:
        return len(rows.read_text().splitlines()) if rows.exists() else 0

    program = ["-c", COUNTER, str(rows), str(starts), str(steps), json.dumps(list(stops))]
    return Job("a counter", program, rows, folder / "log", newest, num_ranks, launcher="ranks")


def test_run_to_end_kills_at_gaps_until_job_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = counting_job(tmp_path, 30, stops=[5, 5, 12])

    def monotonic() -> float:
        """As soon as a start hangs, a thousand seconds go by: the kill is due."""
        return time.monotonic() + 1000 * len(list((tmp_path / "starts").iterdir()))

    monkeypatch.setattr(kills, "time", SimpleNamespace(monotonic=monotonic, sleep=time.sleep))
    gaps = [500.0, 600.0, 700.0]
    attempts = run_to_end(job, iter(gaps), delay_s=0.05)
    *killed_after_s, last = [one.killed_after_s for one in attempts]
    assert last is None
    assert [found is not None and found >= gap for found, gap in zip(killed_after_s, gaps, strict=True)] == [
        True
    ] * 3
    done = [[step for _, step, _ in one.steps] for one in attempts]
    assert done == [[*range(1, 6)], [], [*range(6, 13)], [*range(13, 31)]]
    assert [one.newest_before for one in attempts] == [0, 5, 5, 12]
    assert all(after.launched - before.ended >= 0.05 for before, after in itertools.pairwise(attempts))
    assert lost_committed_steps(attempts) == 0
    wall_s = attempts[-1].ended - attempts[0].launched
    assert sum(parts_of(attempts, step_s=0.001).values()) == pytest.approx(wall_s)


def test_run_to_end_failing_job_raises_with_its_output(tmp_path: Path) -> None:
    program = ["-c", "import sys; sys.exit('no such luck')"]
    job = Job("a job", program, tmp_path / "rows.jsonl", tmp_path / "log", lambda: 0, 1, "ranks")
    with pytest.raises(BenchError, match=r"(?s)a job failed with status \[1\].*no such luck") as caught:
        run_to_end(job, iter(()), delay_s=0)
    assert str(tmp_path / "log") in str(caught.value)


def test_run_to_end_unknown_launcher_raises(tmp_path: Path) -> None:
    job = replace(counting_job(tmp_path, 3), launcher="mpirun")
    with pytest.raises(BenchError, match="unknown launcher 'mpirun'; use one of torchrun, ranks"):
        run_to_end(job, iter(()), delay_s=0)


def test_started_interrupted_leaves_no_process(tmp_path: Path) -> None:
    mark = ""

    def run_until_interrupted() -> None:
        nonlocal mark
        with started(counting_job(tmp_path, 100_000, num_ranks=2)) as processes:
            environment = Path(f"/proc/{processes[0].pid}/environ").read_bytes().split(b"\0")
            (mark,) = (one.decode()[len(MARK) + 1 :] for one in environment if one.startswith(MARK.encode()))
            # Two ranks, and the child of each in a session of its own.
            wait_until(lambda: len(marked(mark)) >= 4, "four processes")
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


def test_reference_loop_resumes_newest_complete_save(tmp_path: Path) -> None:
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
        [sys.executable, str(REPO / "benchmarks/bench_goodput.py"), "--size", "tiny", "--json", "out.json"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=560,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert [path.name for path in folder.iterdir()] == ["out.json"], "it cleans up"
    assert "losses and last checkpoint bitwise equal to those of the undisturbed run" in ended.stdout
    return json.loads((folder / "out.json").read_text())


@patient
def test_bench_goodput_arms_killed_alike_do_all_work(tiny: dict[str, Any]) -> None:
    found = {name: arm["campaigns"][0] for name, arm in tiny["arms"].items()}
    assert list(found) == ["ours", "reference"]
    steps = tiny["arguments"]["steps"]
    for name, one in found.items():
        # A fast machine may be done before the second.
        assert len(one["killed_after_s"]) == one["kills"] in (1, 2)
        assert all(
            mine == theirs
            for mine, theirs in zip(one["planned_kills_s"], found["ours"]["planned_kills_s"], strict=False)
        )
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
def test_bench_goodput_arms_train_alike(tiny: dict[str, Any]) -> None:
    ours, other = (tiny["undisturbed"][name] for name in ("ours", "reference"))
    for (_, step, loss), (_, other_step, other_loss) in zip(ours["steps"], other["steps"], strict=True):
        assert step == other_step
        assert loss == pytest.approx(other_loss, rel=1e-4), f"step {step}"
    assert all(save["blocking_s"] == save["total_s"] for save in other["saves"])
    assert len(other["saves"]) == len({save["step"] for save in other["saves"]}) >= 8


LEDGER_EVENTS = [
    {"event": "start", "attempt": 1, "time": 108.0, "process_started": 100.0},
    {"event": "resume", "attempt": 1, "time": 112.0, "step": 0, "load_s": 1.5, "setup_s": {"launch": 8.0}},
    {"event": "commit", "attempt": 1, "time": 121.0, "step": 4, "blocking_s": 0.5},
    {"event": "progress", "attempt": 1, "time": 124.0, "step": 6, "spent_s": {"step": 11.0}},
    {"event": "start", "attempt": 2, "time": 135.0, "process_started": 130.0},
    {"event": "resume", "attempt": 2, "time": 139.0, "step": 4, "load_s": 2.0, "setup_s": {"launch": 5.0}},
    {"event": "progress", "attempt": 2, "time": 150.0, "step": 9, "spent_s": {"step": 10.0}},
    {"event": "end", "attempt": 2, "time": 151.0, "kind": "finished", "reason": "", "status": 0, "step": 9},
]


@patient
def test_bench_goodput_ledger_agrees_with_outside(tiny: dict[str, Any], tmp_path: Path) -> None:
    """Its set-up begins with the process, imports included; its parts are those of a known ledger."""
    (one,) = tiny["arms"]["ours"]["campaigns"]
    said = one["ledger"]
    assert sum(said["parts_s"].values()) == pytest.approx(said["wall_s"])
    assert said["wall_s"] + said["unseen_s"] == pytest.approx(one["wall_s"])
    assert 0 < said["parts_s"]["setup"] <= said["restart_and_delay_s"] <= said["wall_s"]
    # A step is in the ledger before its row is written.
    assert said["lost_steps"] <= one["lost_steps"] + one["kills"]

    (tmp_path / "ledger.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in LEDGER_EVENTS))
    known = arms.ledger(tmp_path, wall_s=53.0)
    setup_s, idle_s = (112 - 100 - 1.5) + (139 - 130 - 2), 130 - 124
    assert known["restart_and_delay_s"] == pytest.approx(setup_s + idle_s)
    assert (known["wall_s"], known["unseen_s"], known["lost_steps"]) == (51.0, 2.0, 2)


def test_attempt_book_begins_with_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt begins with its launcher, unless that starts its ranks again."""

    def launched(environ: Mapping[str, str] = os.environ) -> float:
        return 10.0 if "TORCHELASTIC_RUN_ID" in environ else 20.0

    def began(name: str) -> float:
        return recorded(tmp_path / name)[0]["process_started"]

    start, resume = recorded(tmp_path / "own")
    assert start["process_started"] < start["time"]
    assert resume["setup_s"]["launch"] > 0, "this process has imported something"
    monkeypatch.setattr(attempt_recorder, "attempt_started", launched)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert began("first") == 10.0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert began("again") == 20.0


def recorded(folder: Path) -> list[dict[str, Any]]:
    """The ledger of an attempt that came as far as its loop."""
    folder.mkdir()
    job = load_job(None, ["--data.text=x", f"--run.dir={folder}"]).job
    world = SimpleNamespace(control=ControlGroup(None), rank=0, device=torch.device("cpu"))
    made = AttemptRecorder()
    record = RunRecord("r", "r", 0.0, attempt=1)
    made.open(job, record, cast(DistributedContext, world), {}, RunHistory(folder))
    made.resumed(step=0, skipped=0, source="fresh start", lost_steps=0, load_s=0.0)
    made.end(status=0, reason="", step=0, error=None)
    return read_events(folder)[:2]
