"""Time until a save is durable, and its processor time: ours against stock DCP.

    torchrun --nproc-per-node 2 benchmarks/bench_durable.py

Four arms alternate in saving an FSDP2-sharded Llama with AdamW's state, without other work: ours
blocking (``disabled``) against ``dcp.save(sync_files=True)``, and ours asynchronous (``async``)
against ``dcp.async_save`` with its defaults. Our arms compute digests of every byte, the stock arms
do not. The benchmark also measures the raw limit: all ranks write the same bytes at once, in direct
writes of 16 MiB from resident memory, followed by an fsync.

  durable_s    from the call until the checkpoint is committed
  cpu_s        processor time of all ranks, their threads and writer processes
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from bench import command, machine, pairs
from bench.savers import Ours, Saver, StockAsync, StockBlocking
from bench.workload import model_config, sharded_llama, state_bytes

from kempnerforge.config.schema import AsyncCheckpointMode

SIZES = {"tiny": {"size_mb": 3, "pairs": 2}, "cpu": {"size_mb": 1000}, "gpu": {"size_mb": 16000}}


def summed(value: float) -> float:
    """Return the sum over all ranks."""
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item()


def measure(saver: Saver, folder: Path, pair: int) -> pairs.Measured:
    """Measure one save."""
    dist.barrier()
    cpu_s = machine.cpu_seconds(saver.pid())
    started = time.perf_counter()
    saver.begin(folder / f"save-{pair}")
    saver.before_update()
    saver.wait()
    durable_s = time.perf_counter() - started
    dist.barrier()  # with stock DCP, other ranks return before rank 0 has published the checkpoint
    cpu_s = machine.cpu_seconds(saver.pid()) - cpu_s
    measured = {"durable_s": durable_s, "cpu_s": summed(cpu_s)}
    command.empty(folder)
    return measured


def measure_raw(folder: Path, size_bytes: int, pair: int) -> pairs.Measured:
    """Measure the raw limit."""
    path = folder / f"raw-{dist.get_rank()}"
    return {"durable_s": machine.raw_write_s(path, size_bytes, barrier=dist.barrier)}


def main() -> None:
    """Measure and print."""
    arguments = command.parse(__doc__, SIZES)
    device = command.start_ranks()
    model, optimizer = sharded_llama(model_config(arguments.size_mb), device)
    savers: dict[str, Saver] = {
        "ours blocking": Ours(model, optimizer, AsyncCheckpointMode.disabled),
        "dcp.save": StockBlocking(model, optimizer),
        "ours async": Ours(model, optimizer, AsyncCheckpointMode.async_),
        "dcp.async_save": StockAsync(model, optimizer),
    }
    with command.shared_folder(arguments.dir) as folder:
        arms: dict[str, Callable[[int], pairs.Measured]] = {
            name: partial(measure, saver, folder) for name, saver in savers.items()
        }
        arms["raw"] = partial(measure_raw, folder, state_bytes(model) // dist.get_world_size())
        found = pairs.alternate(arms, arguments.pairs)
        facts = machine.facts(folder)
    for saver in savers.values():
        saver.close()
    if dist.get_rank() == 0:
        show(
            arguments,
            found,
            facts,
            f"{state_bytes(model) / 1e6:.0f} MB on {dist.get_world_size()} x {device}",
        )
    dist.destroy_process_group()


def show(
    arguments: argparse.Namespace,
    found: dict[str, list[pairs.Measured]],
    facts: dict[str, object],
    where: str,
) -> None:
    """Print the table and write the file."""

    def versus(label: str, ours: str, other: str, name: str, goal: float | None = None) -> pairs.Comparison:
        return pairs.compare(
            label, pairs.column(found[ours], name), pairs.column(found[other], name), goal=goal
        )

    rows = [
        versus("blocking durable_s / dcp.save", "ours blocking", "dcp.save", "durable_s", goal=0.6),
        versus("async durable_s / dcp.async_save", "ours async", "dcp.async_save", "durable_s", goal=0.6),
        versus("blocking cpu_s / dcp.save", "ours blocking", "dcp.save", "cpu_s"),
        versus("async cpu_s / dcp.async_save", "ours async", "dcp.async_save", "cpu_s", goal=0.25),
        # A rate is the inverse of a time: at least 0.85 of the raw rate.
        versus("blocking durable_s / raw write", "ours blocking", "raw", "durable_s", goal=1 / 0.85),
    ]
    print(f"{where}; {machine.describe(facts)}")
    print(f"{arguments.pairs} pairs")
    pairs.show(rows, reference="reference", others={})
    if arguments.json:
        pairs.write_json(arguments.json, rows, machine=facts, measured=found)


if __name__ == "__main__":
    main()
