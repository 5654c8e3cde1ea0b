"""Time of a restart in place: from SIGKILL of a rank to the end of the first new step.

    python benchmarks/bench_relaunch.py

``kempnerforge train`` is compared with ``torchrun --max-restarts`` around
``benchmarks/bench/bare_loop.py``, which uses ``dcp.load``. Both have the same model and as many bytes
of state, and resume from the same step. The last rank is killed when two steps are done. Nothing is
saved in between, so both repeat these steps: the loss after the restart must be that before it, and
the losses of both arms must agree, or the benchmark fails.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import command, machine, pairs
from bench.kills import MARK, kill_marked
from bench.launches import Task, largest_difference
from bench.workload import STATE_BYTES
from bench_restart import SAVED_STEP, make_task

from kempnerforge.telemetry.jsonl import read_rows

SIZES = {
    "tiny": {"ranks": 2, "size_mb": 3, "n_layers": 2, "seq_len": 32, "batch_size": 1, "pairs": 1},
    "cpu": {"ranks": 2, "size_mb": 1000, "n_layers": 24, "seq_len": 32, "batch_size": 1},
    "gpu": {"ranks": 1, "size_mb": 12000, "n_layers": 16, "seq_len": 2048, "batch_size": 4, "pairs": 5},
}
GOALS = {"relaunch_s": 0.9}
STEPS = 500
"""More than either arm reaches before it is ended."""
STEPS_BEFORE_KILL = 2
POLL_S = 0.005
FRESH_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Makes torchrun open a new store at each restart. Else the bare loop's ranks may read from the store
what a killed rank wrote there, and then wait for one another until a time-out."""
TIMEOUT_S = 300.0


def relaunch(launcher: Sequence[str], rows: Path, ranks: int, log: Path) -> tuple[float, list[float]]:
    """Start ``launcher``, kill its last rank, and wait for a step of the next start.

    Return the seconds from the kill to the end of that step, and the first loss of both starts.
    """
    mark = uuid.uuid4().hex
    known = len(_train_rows(rows))
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *launcher],
            env={"OMP_NUM_THREADS": "1", **os.environ, **FRESH_STORE, MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        before = _wait_for_rows(rows, known + STEPS_BEFORE_KILL, process, log)[known:]
        os.kill(_rank(process.pid, ranks - 1), signal.SIGKILL)
        killed = time.time()
        while True:
            found = _wait_for_rows(rows, known + len(before), process, log)
            new = [row for row in found[known:] if row["attempt"] != before[0]["attempt"]]
            if new:
                return new[0]["time"] - killed, [before[0]["train/loss"], new[0]["train/loss"]]
            time.sleep(POLL_S)
    finally:
        kill_marked(mark, [process])


def _train_rows(path: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(path).rows if "train/loss" in row] if path.exists() else []


def _wait_for_rows(
    path: Path, count: int, process: subprocess.Popen[bytes], log: Path
) -> list[dict[str, Any]]:
    deadline = time.monotonic() + TIMEOUT_S
    while len(rows := _train_rows(path)) < count:
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"no step was logged (status {process.poll()}):\n{log.read_text()}")
        time.sleep(POLL_S)
    return rows


def _rank(launcher: int, rank: int) -> int:
    """Return the pid of a rank: a child of the launcher."""
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return int(pid)
    raise RuntimeError(f"rank {rank} is not a child of {launcher}")


def arms(task: Task, saved: Path, losses: dict[str, list[float]]) -> Mapping[str, Any]:
    """Return both arms. Each stores its losses in ``losses``."""
    run, bare_rows = task.folder / "run", task.folder / "bare.jsonl"
    ours = ["kempnerforge", "train", str(task.folder / "job.toml"), f"--processes={task.ranks}"]
    ours += [f"--run.dir={run}", f"--train.max_steps={STEPS}"]
    torchrun = ["torch.distributed.run", "--standalone", "--max-restarts=3"]
    torchrun += [f"--nproc-per-node={task.ranks}"]
    torchrun += task.bare_command(start=SAVED_STEP, steps=STEPS, load=saved, log=bare_rows)
    commands = {"ours": (ours, run / "metrics.jsonl"), "torchrun": (torchrun, bare_rows)}

    def measure(name: str) -> pairs.Measured:
        launcher, rows = commands[name]
        seconds, losses[name] = relaunch(launcher, rows, task.ranks, task.folder / f"{name}.log")
        if losses[name][0] != losses[name][1]:
            sys.exit(
                f"{name}: the loss was {losses[name][0]} before the kill, and {losses[name][1]} after it"
            )
        return {"relaunch_s": seconds}

    return {name: lambda _pair, name=name: measure(name) for name in commands}


def main() -> None:
    """Measure and print."""
    arguments: argparse.Namespace = command.parse(__doc__, SIZES)
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.dir or Path.cwd(), prefix="bench-") as name:
        task = make_task(arguments, Path(name), steps=STEPS)
        saved = task.folder / "dcp"
        task.train(task.folder / "run", f"--train.max_steps={SAVED_STEP}", "--checkpoint.save_last=true")
        task.bare(steps=SAVED_STEP, save=saved)
        found = pairs.alternate(
            arms(task, saved, losses), arguments.pairs, warmups=int(arguments.size != "tiny")
        )
        facts = machine.facts(task.folder)
    apart = largest_difference(losses["ours"], losses["torchrun"])
    if not apart <= task.tolerance:  # also for NaN
        sys.exit(f"the losses differ by {apart:.2g}, relative: the bare loop does other work")
    columns = {arm: pairs.column(rows, "relaunch_s") for arm, rows in found.items()}
    rows = [pairs.compare("relaunch_s", columns["ours"], columns["torchrun"], goal=GOALS["relaunch_s"])]
    size_bytes = STATE_BYTES * task.model.num_parameters
    print(f"{size_bytes / 1e6:.0f} MB of state, {task.ranks} ranks; {machine.describe(facts)}")
    print(f"{arguments.pairs} pairs; losses after the restart differ by {apart:.2g}, relative")
    pairs.show(rows, reference="torchrun, dcp.load", others={})
    if arguments.json:
        rest = {"machine": facts, "measured": found, "size_bytes": size_bytes, "losses_differ_by": apart}
        pairs.write_json(arguments.json, rows, losses=losses, **rest)


if __name__ == "__main__":
    main()
