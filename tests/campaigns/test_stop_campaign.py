"""SIGTERM at random moments of runs with a slow part: the last finished step is committed, within the grace.

Real torchrun, two gloo processes. What is slow would take longer than the grace if a stop waited for it:
deletions of older checkpoints, a validation; or it makes everything else slower: metadata of files, one rank.
Moments, kinds of slowness and who gets the signal come from a seed; CI takes a slice.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.patch_target import patch_target
from support.polling import wait_until
from support.runs import Fault, Launcher, Run, make_run
from support.stop_train import FAULTS, MARKS

pytest_plugins = ["support.run_fixtures"]

SCRIPT = Path(__file__).parents[1] / "support" / "stop_train.py"
UPDATE = patch_target("kempnerforge.train.step:LocalStep.update")
KINDS = ("deletion", "validation", "metadata", "rank")
SEED, CASES = 2026, 40
SLICE = range(len(KINDS))
START_S = 200.0
"""The longest that a start, or the steps before a signal, may take on a busy machine."""
SETTINGS = {
    "train.max_steps": 1_000_000,
    "scheduler.warmup_steps": 0,
    "checkpoint.interval": 2,
    "checkpoint.keep_last_n": 1,
    "eval.interval": 0,
}
EVAL_BATCHES, MICRO_BATCHES = 10, 2
"""Of a validation, and of each batch on each rank."""


@dataclass
class Case:
    """One run, its slow part, and when who gets the signal."""

    kind: str
    settings: dict[str, Any]
    faults: list[Fault]
    steps: int
    """Finished before the signal, at least; with 0 the attempt has begun, and may still be setting up."""
    wait_s: float
    """From then to the signal."""
    to: int | None
    """The rank that gets the signal; None: the launcher, which passes it on to all."""
    is_hit: Callable[[Run], bool] = field(repr=False)
    """Whether the slow part is under way."""


def make_case(number: int, folder: Path) -> Case:
    """The case of this number. The same for the same number, but for paths."""
    draw = random.Random(SEED * 1000 + number)
    kind = KINDS[number % len(KINDS)]
    step_s = draw.uniform(0.02, 0.15)
    settings = SETTINGS | {
        "checkpoint.async_mode": draw.choice(["disabled", "async", "async_with_pinned_mem"])
    }
    faults: list[Fault] = [("slow_calls", {"target": UPDATE, "seconds": step_s, "rank": None})]
    anyone, most = draw.randrange(2), 14
    checkpoints = str(folder / "run/checkpoints")
    is_hit: Callable[[Run], bool] = lambda run: bool(run.unfinished())  # noqa: E731
    if kind == "deletion":
        how = {"operations": ["unlink", "rmdir"], "name": ".deleting", "seconds": draw.uniform(10, 60)}
        faults.append(("slow_disk", {"folder": checkpoints, "rank": 0, **how}))
        is_hit = lambda run: any(name.endswith(".deleting") for name in run.unfinished())  # noqa: E731
    elif kind == "validation":
        quick = EVAL_BATCHES * MICRO_BATCHES
        how = {"seconds": draw.uniform(1.5, 3), "quick": quick, "log": str(folder / "validation")}
        faults.append(("slow_validation", how))
        most = draw.randint(3, 9)
        settings |= {"eval.interval": most, "eval.num_batches": EVAL_BATCHES}
        is_hit = lambda _run: (folder / "validation.0").read_text().count("\n") > quick  # noqa: E731
    elif kind == "metadata":
        how = {"seconds": draw.uniform(0.02, 0.1)}
        faults.append(("slow_disk", {"folder": str(folder / "run"), "rank": None, **how}))
    else:
        faults.append(("slow_calls", {"target": UPDATE, "seconds": draw.uniform(0, 0.5), "rank": anyone}))
        faults.append(("slow_shards", {"seconds": draw.uniform(0.5, 4), "rank": anyone}))
    steps = draw.choice([0, most, most, draw.randint(1, most)])
    to = draw.choice([None, None, 0, 1])
    return Case(kind, settings, faults, steps, draw.uniform(0, 3), to, is_hit)


def finished_steps(run: Run) -> int:
    """The last step that was finished, 0 before the first one."""
    return max((row["step"] for row in run.rows() if "train/loss" in row), default=0)


def has_begun(run: Run, steps: int) -> bool:
    """Whether ``steps`` steps are finished; of none, whether the attempt is recorded."""
    return finished_steps(run) >= steps if steps else (run.folder / "ledger.jsonl").exists()


def stop(run: Run, case: Case) -> tuple[bool, float]:
    """Start the run under torchrun, stop it, wait for its end.

    Returns whether the slow part was under way, and the seconds from the signal to the end.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    log = run.base / "log"
    with log.open("wb") as file:
        agent = subprocess.Popen(
            [*torchrun, str(SCRIPT), f"--config={run.config}"],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {FAULTS: json.dumps(case.faults), MARKS: str(run.base)},
            start_new_session=True,
        )
    try:
        has_come = lambda: has_begun(run, case.steps) or agent.poll() is not None  # noqa: E731
        wait_until(has_come, f"{case.steps} steps", timeout_s=START_S)
        time.sleep(case.wait_s)
        is_hit = finished_steps(run) > 0 and case.is_hit(run)
        if case.to is None:
            agent.send_signal(signal.SIGTERM)
        else:
            os.kill(int((run.base / f"pid.{case.to}").read_text()), signal.SIGTERM)
        signalled = time.monotonic()
        agent.wait(START_S)
        took_s = time.monotonic() - signalled
    finally:
        agent.kill()
        agent.wait()
    return is_hit, took_s


def assert_nothing_lost(run: Run, case: Case, launcher: Launcher) -> int:
    """Every rank ended by itself with 75, and the last finished step is the newest one. Returns that step."""
    output = f"{case}\n{(run.base / 'log').read_text()}"
    statuses = [run.base / f"status.{rank}" for rank in range(2)]
    assert all(path.exists() for path in statuses), f"killed, or ended at once\n{output}"
    assert [path.read_text() for path in statuses] == ["75", "75"], output
    assert "so this process ends now" not in output
    assert not (run.folder / "stacks").exists(), output
    finished = finished_steps(run)
    last_exit = run.record["last_exit"]
    assert (last_exit["status"], last_exit["step"]) == (75, finished), output
    assert "SIGTERM" in last_exit["reason"], output
    assert max(run.sound(), default=0) == finished, output
    launcher.finish(run, f"--train.max_steps={finished + 2}", "--eval.interval=0", ranks=2)
    receipt = run.receipts()[-1]
    assert (receipt["step"], receipt["lost_steps"]) == (finished, 0), output
    return finished


def play(number: int, folder: Path, corpus: Path, launcher: Launcher) -> Counter[str]:
    """Play one case and count what it was."""
    folder.mkdir(exist_ok=True)
    case = make_case(number, folder)
    run = make_run(folder, corpus, **case.settings)
    is_hit, took_s = stop(run, case)
    finished = assert_nothing_lost(run, case, launcher)
    where = "after a step" if finished else "before the first step"
    print(
        f"{number}: {case.kind}, to {case.to}, after step {finished}, hit: {is_hit}, ended in {took_s:.1f} s"
    )
    return Counter([case.kind, where, *([f"in a slow {case.kind}"] if is_hit else [])])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", SLICE)
def test_stop_beside_slow_part_commits_last_step(
    launcher: Launcher, corpus: Path, tmp_path: Path, number: int
) -> None:
    play(number, tmp_path / "case", corpus, launcher)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_stop_at_forty_random_moments_loses_no_step(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    total: Counter[str] = Counter()
    for number in range(CASES):
        total += play(number, tmp_path / str(number), corpus, launcher)
    print(dict(total))
    assert all(total[kind] == CASES // len(KINDS) for kind in KINDS)
    assert all(total[f"in a slow {kind}"] for kind in KINDS), total
