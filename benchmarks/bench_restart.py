"""Time of a restart: from the launch of torchrun to the end of the first step after a resume.

    python benchmarks/bench_restart.py

``scripts/train.py`` is compared with ``benchmarks/bench/bare_loop.py``, which uses ``dcp.load``.
Both have the same model and as many bytes of state, each from its own checkpoint, with files in the
page cache. The parts are

  start_s       torchrun, the interpreter, imports
  set_up_s      process groups, the run's folder, data, model and optimizer
  load_s        reading the state; ours also checks every digest and allocates the buffers for saves
  first_step_s  the first step
  imports_s     only the imports that training needs, in one process; the bare loop imports torch,
                distributed, fsdp and checkpoint. Also shown: ``import torch``, and with ``fully_shard``

Both must load the state that they saved: the losses of two steps must agree, or the benchmark
fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from bench import command, machine, pairs
from bench.launches import Bare, Ours, Task, compare_starts
from bench.workload import STATE_BYTES, model_config

SIZES = {
    "tiny": {"ranks": 1, "size_mb": 3, "n_layers": 2, "seq_len": 32, "batch_size": 1, "pairs": 1},
    "cpu": {"ranks": 2, "size_mb": 1000, "n_layers": 24, "seq_len": 32, "batch_size": 1},
    "gpu": {"ranks": 1, "size_mb": 12000, "n_layers": 16, "seq_len": 2048, "batch_size": 4, "pairs": 5},
}
GOALS = {"total_s": 1.1, "start_s": None, "set_up_s": None, "load_s": None, "first_step_s": None}
SAVED_STEP = 2
IMPORTS = {
    "ours": "from kempnerforge.cli.train import import_training; import_training()",
    "bare": "import torch.distributed.fsdp, torch.distributed.checkpoint.state_dict",
    "torch": "import torch",
    "fully_shard": "from torch.distributed.fsdp import fully_shard",
}
ALONE = "torch", "fully_shard"
"""Imports that are shown for comparison."""


def parts_of_ours(done: Ours) -> pairs.Measured:
    """Return the parts of our restart, from the ledger and metrics.jsonl."""
    setup_s = dict(done.resume["setup_s"])
    load_s, launch_s = setup_s.pop("resume"), setup_s.pop("launch")
    return {
        "total_s": done.step_ended[0] - done.began,
        "start_s": done.start["process_started"] + launch_s - done.began,
        "set_up_s": sum(setup_s.values()),
        "load_s": load_s,
        "first_step_s": done.step_ended[0] - done.resume["time"],
    }


def parts_of_bare(done: Bare) -> pairs.Measured:
    """Return the parts of the bare loop's restart, from its output."""
    ended = done.ended
    return {
        "total_s": done.step_ended[0] - done.began,
        "start_s": ended["imports"] - done.began,
        "set_up_s": ended["model"] - ended["imports"],
        "load_s": ended["load"] - ended["model"],
        "first_step_s": done.step_ended[0] - ended["load"],
    }


def import_s(code: str) -> float:
    """Return the seconds of a process that runs ``code``."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - started


def make_task(arguments: argparse.Namespace, folder: Path, *, steps: int = SAVED_STEP + 2) -> Task:
    """Return the job that both arms train."""
    on_gpu = torch.cuda.is_available()
    task = Task(
        folder,
        model_config(arguments.size_mb, arguments.n_layers),
        ranks=arguments.ranks,
        batch_size=arguments.batch_size,
        seq_len=arguments.seq_len,
        steps=steps,  # a wrong optimizer moment would change the loss of the second after the resume
        mixed_precision="bf16" if on_gpu else "fp32",
    )
    task.write()
    return task


def main() -> None:
    """Measure and print."""
    arguments = command.parse(__doc__, SIZES)
    with tempfile.TemporaryDirectory(dir=arguments.dir or Path.cwd(), prefix="bench-") as name:
        task = make_task(arguments, Path(name))
        run, saved = task.folder / "run", task.folder / "dcp"
        task.train(run, f"--train.max_steps={SAVED_STEP}", "--checkpoint.save_last=true")
        task.bare(steps=SAVED_STEP, save=saved)

        def ours() -> tuple[Ours, pairs.Measured]:
            done = task.train(run)
            return done, {**parts_of_ours(done), "imports_s": import_s(IMPORTS["ours"])}

        def bare() -> tuple[Bare, pairs.Measured]:
            done = task.bare(start=SAVED_STEP, steps=task.steps, load=saved)
            alone = {f"{name}_s": import_s(IMPORTS[name]) for name in ALONE}
            return done, {**parts_of_bare(done), "imports_s": import_s(IMPORTS["bare"]), **alone}

        found, losses, apart = compare_starts(
            (ours, bare), arguments.pairs, warmups=int(arguments.size != "tiny"), tolerance=task.tolerance
        )
        facts = machine.facts(task.folder)
    goals = {**GOALS, "imports_s": 1.1}
    rows = [
        pairs.compare(part, *(pairs.column(found[arm], part) for arm in found), goal=goal)
        for part, goal in goals.items()
    ]
    size_bytes = STATE_BYTES * task.model.num_parameters
    print(f"{size_bytes / 1e6:.0f} MB of state, {task.ranks} ranks; {machine.describe(facts)}")
    print(f"{arguments.pairs} pairs; losses after the resume differ by {apart:.2g}, relative")
    alone = {IMPORTS[name]: pairs.column(found["bare"], f"{name}_s") for name in ALONE}
    pairs.show(rows, reference="bare, dcp.load", others=alone)
    if arguments.json:
        rest = {
            "machine": facts,
            "measured": found,
            "size_bytes": size_bytes,
            "losses_differ_by": apart,
        }
        rest["losses"] = losses
        pairs.write_json(arguments.json, rows, **rest)


if __name__ == "__main__":
    main()
