"""Overhead of saves: steps with saves minus steps without, ours against stock ``dcp.async_save``.

    torchrun --nproc-per-node 2 benchmarks/bench_save.py

Both arms save the same FSDP2-sharded Llama with AdamW's state, while the same steps run: some
matrix products and two all-reduces. Every round measures on rank 0:

  overhead_s   (time of the steps with saves - time of as many without) / saves, ``--steps`` steps per save
  beside       time of the steps during a write, without blocking / time of as many steps without a save
  blocking_s   how long the loop was blocked: in the call, and in the wait before the tensors change
  durable_s    from the call until the checkpoint is committed, during the steps

Figures depend on the machine and its load: compare ratios. The first round of each arm is
discarded.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from pathlib import Path

import torch.distributed as dist
from bench import command, machine, pairs
from bench.savers import Ours, Saver, StockAsync
from bench.workload import Steps, model_config, sharded_llama, state_bytes

from kempnerforge.config.schema import AsyncCheckpointMode

SIZES = {
    "tiny": {"size_mb": 3, "width": 64, "steps": 3, "saves": 1, "pairs": 2},
    "cpu": {"size_mb": 1000, "width": 1350, "steps": 10, "saves": 2},
    "gpu": {"size_mb": 16000, "width": 16384, "steps": 10, "saves": 3},
}


def end_phase(seconds: list[float], started: float) -> float:
    """Append the time since ``started`` to ``seconds``. Return the current time."""
    now = time.perf_counter()
    seconds.append(now - started)
    return now


def run_without(steps: Steps, count: int) -> list[float]:
    """Return the seconds of each of ``count`` steps."""
    seconds: list[float] = []
    now = time.perf_counter()
    for _ in range(count):
        steps.forward_backward()
        steps.update()
        now = end_phase(seconds, now)
    return seconds


def run_with(saver: Saver, steps: Steps, count: int, path: Path) -> dict[str, list[float]]:
    """Run ``count`` steps with a save that begins before the first.

    Return the seconds of all steps, of those during the write, of blocking, and until the save is
    durable.
    """
    seconds: dict[str, list[float]] = {"all": [], "beside": [], "blocking": [], "durable": []}
    began = now = time.perf_counter()
    saver.begin(path)
    blocking_s = time.perf_counter() - began
    for number in range(count):
        steps.forward_backward()
        if number == 0:
            waited = time.perf_counter()
            saver.before_update()
            blocking_s += time.perf_counter() - waited
        steps.update()
        now = end_phase(seconds["all"], now)
        if not seconds["durable"]:
            seconds["beside"].append(seconds["all"][-1])
            if saver.done():
                seconds["durable"].append(now - began)
    saver.wait()
    seconds["beside"][0] -= blocking_s
    if not seconds["durable"]:
        seconds["durable"].append(time.perf_counter() - began)
    seconds["blocking"].append(blocking_s)
    return seconds


def measure(saver: Saver, steps: Steps, folder: Path, count: int, saves: int, pair: int) -> pairs.Measured:
    """Measure one round of one arm."""
    dist.barrier()
    without = run_without(steps, count * saves)
    with_saves: dict[str, list[float]] = {}
    for number in range(saves):
        dist.barrier()
        for name, values in run_with(saver, steps, count, folder / f"{pair}-{number}").items():
            with_saves.setdefault(name, []).extend(values)
    command.empty(folder)
    step_s = statistics.median(without)
    return {
        "overhead_s": (sum(with_saves["all"]) - sum(without)) / saves,
        "beside": statistics.mean(with_saves["beside"]) / step_s,
        "blocking_s": statistics.median(with_saves["blocking"]),
        "durable_s": statistics.median(with_saves["durable"]),
        "step_s": step_s,
    }


def main() -> None:
    """Measure and print."""
    arguments = command.parse(__doc__, SIZES)
    device = command.start_ranks()
    model, optimizer = sharded_llama(model_config(arguments.size_mb), device)
    steps = Steps(arguments.width, device)
    savers: dict[str, Saver] = {
        "ours": Ours(model, optimizer, AsyncCheckpointMode.async_pinned),
        "stock": StockAsync(model, optimizer),
    }
    with command.shared_folder(arguments.dir) as folder:
        arms = {
            name: partial(measure, saver, steps, folder, arguments.steps, arguments.saves)
            for name, saver in savers.items()
        }
        found = pairs.alternate(arms, arguments.pairs)
        facts = machine.facts(folder)
    for saver in savers.values():
        saver.close()
    if dist.get_rank() == 0:
        rows = [
            pairs.compare(name, *(pairs.column(found[arm], name) for arm in savers), goal=goal)
            for name, goal in {
                "overhead_s": 0.15,
                "blocking_s": None,
                "durable_s": None,
                "beside": None,
            }.items()
        ]
        where = f"{dist.get_world_size()} x {device.type}"
        print(f"{state_bytes(model) / 1e6:.0f} MB on {where}; {machine.describe(facts)}")
        print(f"{arguments.pairs} pairs of {arguments.saves} saves, a save every {arguments.steps} steps")
        others = {"step_s": [row["step_s"] for of_arm in found.values() for row in of_arm]}
        if device.type == "cuda":  # a copy to the host that overlaps with a step costs the step nothing
            mine = state_bytes(model) // dist.get_world_size()
            rate = machine.to_host_bytes_per_s(device, min(mine, 1 << 30))
            others["limit: copy - step, s"] = [max(0.0, mine / rate - step_s) for step_s in others["step_s"]]
        pairs.show(rows, reference="dcp.async_save", others=others)
        if arguments.json:
            pairs.write_json(
                arguments.json, rows, machine=facts, measured=found, size_bytes=state_bytes(model)
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
