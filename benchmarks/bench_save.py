"""What saves cost a run: steps with saves minus steps without, ours against stock ``dcp.async_save``.

    torchrun --nproc-per-node 2 benchmarks/bench_save.py

Both arms save the same FSDP2-sharded Llama with AdamW's state, while the same steps run: some matrix products
and two all-reduces. In every round, as the first rank sees it,

  tax_s        (time of the steps with saves - time of as many without) / saves, ``--steps`` steps to a save
  beside       the steps during which a save is being written, the standing still left out / as many without
  blocking_s   how long the loop stood still: the call, and the wait before the tensors change
  durable_s    from the call until the checkpoint is committed, beside the steps

Figures are of this machine and minute: compare ratios. The first round of each arm is thrown away.
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
    """Note the time since ``started``; the time now."""
    now = time.perf_counter()
    seconds.append(now - started)
    return now


def run_without(steps: Steps, count: int) -> list[float]:
    """Seconds of each of ``count`` steps."""
    seconds: list[float] = []
    now = time.perf_counter()
    for _ in range(count):
        steps.forward_backward()
        steps.update()
        now = end_phase(seconds, now)
    return seconds


def run_with(saver: Saver, steps: Steps, count: int, path: Path) -> dict[str, list[float]]:
    """``count`` steps with a save that begins before the first: seconds of all, of those beside the write."""
    found: dict[str, list[float]] = {"all": [], "beside": [], "blocking": [], "durable": []}
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
        now = end_phase(found["all"], now)
        if not found["durable"]:
            found["beside"].append(found["all"][-1])
            if saver.done():
                found["durable"].append(now - began)
    saver.wait()
    found["beside"][0] -= blocking_s
    if not found["durable"]:
        found["durable"].append(time.perf_counter() - began)
    found["blocking"].append(blocking_s)
    return found


def measure(saver: Saver, steps: Steps, folder: Path, count: int, saves: int, pair: int) -> pairs.Measured:
    """One round of one arm."""
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
        "tax_s": (sum(with_saves["all"]) - sum(without)) / saves,
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
        told = machine.facts(folder)
    for saver in savers.values():
        saver.close()
    if dist.get_rank() == 0:
        rows = [
            pairs.compare(name, *(pairs.column(found[arm], name) for arm in savers), goal=goal)
            for name, goal in {"tax_s": 0.15, "blocking_s": None, "durable_s": None, "beside": None}.items()
        ]
        where = f"{dist.get_world_size()} x {device.type}"
        print(f"{state_bytes(model) / 1e6:.0f} MB on {where}; {machine.tell(told)}")
        print(f"{arguments.pairs} pairs of {arguments.saves} saves, a save every {arguments.steps} steps")
        others = {"step_s": [row["step_s"] for of_arm in found.values() for row in of_arm]}
        if device.type == "cuda":  # nothing that the copy to the host can hide behind a step costs the step
            mine = state_bytes(model) // dist.get_world_size()
            rate = machine.to_host_bytes_per_s(device, min(mine, 1 << 30))
            others["limit: copy - step, s"] = [max(0.0, mine / rate - step_s) for step_s in others["step_s"]]
        pairs.show(rows, reference="dcp.async_save", others=others)
        if arguments.json:
            pairs.write_json(
                arguments.json, rows, machine=told, measured=found, size_bytes=state_bytes(model)
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
