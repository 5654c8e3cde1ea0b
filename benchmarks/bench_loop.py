"""Overhead of the harness per step: ``scripts/train.py`` against a bare FSDP2 loop of the same model.

    python benchmarks/bench_loop.py

torchrun starts both in turn. They train the same model on the same batches. The bare loop is
``benchmarks/bench/bare_loop.py``. Ours selects its batches, agrees with all ranks after every step,
and writes console, metrics.jsonl and ledger. No save is due. The benchmark measures for every start:

  step_s      median time from one step's end to the next, without the first steps
  outside_ms  only ours: time outside of forward, backward and update, including waiting for other ranks
  of the matrix rate: the FLOP/s of ours over those of large matrix products, measured afterwards

The losses of both must agree. Otherwise the reference does not do the same work, and the benchmark
fails.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench import command, machine, pairs
from bench.launches import Bare, Ours, Task, compare_starts

from kempnerforge.config.schema import ModelConfig
from kempnerforge.model.llama import Llama

SIZES = {
    "tiny": {"ranks": 2, "dim": 64, "n_layers": 2, "seq_len": 32, "batch_size": 2, "steps": 6, "pairs": 1},
    "cpu": {"ranks": 2, "dim": 256, "n_layers": 6, "seq_len": 128, "batch_size": 4, "steps": 30},
    "gpu": {
        "ranks": 1,
        "dim": 2048,
        "n_layers": 16,
        "seq_len": 2048,
        "batch_size": 8,
        "steps": 60,
        "pairs": 5,
    },
}
WARMUP_STEPS = 3


def median_gap_s(ended: list[float]) -> float:
    """Return the median time between the ends of steps, without the first steps."""
    return statistics.median(after - before for before, after in itertools.pairwise(ended[WARMUP_STEPS:]))


def outside_ms(rows: list[dict[str, Any]]) -> float:
    """Return the median time of our steps outside of forward, backward and update."""
    spans = [row["time/forward_backward_s"] + row["time/optimizer_s"] for row in rows[WARMUP_STEPS + 1 :]]
    gaps = [b["time"] - a["time"] for a, b in itertools.pairwise(rows[WARMUP_STEPS:])]
    return 1000 * statistics.median(gap - span for gap, span in zip(gaps, spans, strict=True))


def make_task(arguments: argparse.Namespace, folder: Path) -> Task:
    """Return the job that both arms train."""
    on_gpu = torch.cuda.is_available()
    model = ModelConfig(
        dim=arguments.dim,
        n_layers=arguments.n_layers,
        n_heads=arguments.dim // 64,
        vocab_size=32000 if on_gpu else 512,
        max_seq_len=arguments.seq_len,
    )
    task = Task(
        folder,
        model,
        ranks=arguments.ranks,
        batch_size=arguments.batch_size,
        seq_len=arguments.seq_len,
        steps=arguments.steps,
        mixed_precision="bf16" if on_gpu else "fp32",
        compile_model=on_gpu,
    )
    task.write()
    return task


def of_matrix_rate(task: Task, step_s: list[float]) -> list[float]:
    """Return the share that ours reaches of the FLOP/s of matrix products on a device or core per rank."""
    on_gpu = torch.cuda.is_available()
    device, width = torch.device("cuda" if on_gpu else "cpu"), 8192 if on_gpu else 1024
    rate = machine.matmul_flops(device, torch.bfloat16 if on_gpu else torch.float32, width=width)
    with torch.device("meta"):
        flops_per_token = Llama(task.model).flops_per_token(task.seq_len)
    flops = task.batch_size * task.seq_len * flops_per_token
    return [flops / seconds / rate for seconds in step_s]


def main() -> None:
    """Measure and print."""
    arguments = command.parse(__doc__, SIZES)
    with tempfile.TemporaryDirectory(dir=arguments.dir or Path.cwd(), prefix="bench-") as name:
        task = make_task(arguments, Path(name))

        def ours() -> tuple[Ours, pairs.Measured]:
            done = task.train(Path(tempfile.mkdtemp(dir=task.folder)))
            return done, {"step_s": median_gap_s(done.step_ended), "outside_ms": outside_ms(done.rows)}

        def bare() -> tuple[Bare, pairs.Measured]:
            done = task.bare(steps=task.steps)
            return done, {"step_s": median_gap_s(done.step_ended)}

        found, losses, apart = compare_starts(
            (ours, bare), arguments.pairs, warmups=int(arguments.size != "tiny"), tolerance=task.tolerance
        )
        facts = machine.facts(task.folder)
    step_s = [pairs.column(found[arm], "step_s") for arm in found]
    row = pairs.compare("step_s", *step_s, goal=1.02)
    extra_ms = [1000 * (ours_s - bare_s) for ours_s, bare_s in zip(*step_s, strict=True)]
    others = {"ours - bare, ms per step": extra_ms, "outside_ms": pairs.column(found["ours"], "outside_ms")}
    others["of the matrix rate"] = of_matrix_rate(task, step_s[0])
    parameters = task.model.num_parameters / 1e6
    print(
        f"{parameters:.1f}M parameters, {task.ranks} ranks, {task.steps} steps per start; "
        f"{machine.describe(facts)}"
    )
    print(f"{arguments.pairs} pairs; losses differ by at most {apart:.2g}, relative")
    pairs.show([row], reference="bare FSDP2 loop", others=others)
    if arguments.json:
        rest = {"machine": facts, "measured": found, "losses_differ_by": apart, "losses": losses}
        pairs.write_json(arguments.json, [row], extra_ms=extra_ms, **rest)


if __name__ == "__main__":
    main()
