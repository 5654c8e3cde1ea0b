"""Host memory of saving beyond the state itself, over many saves: ours and ``dcp.async_save``.

    torchrun --nproc-per-node 2 benchmarks/bench_memory.py

Both arms save the same FSDP2-sharded Llama with AdamW's state ``--saves`` times, one after the
other. ``beyond`` is the largest memory of all ranks and their writers while a save was being
written, minus their memory before the first save, in copies of the state. Proportional set sizes
are used, so that shared memory is counted once. ``growth`` is the increase in the second half of
the saves.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from bench import command, machine, pairs
from bench.savers import Ours, Saver, StockAsync
from bench.workload import model_config, sharded_llama, state_bytes

from kempnerforge.checkpoint.save import host_buffers
from kempnerforge.config.schema import AsyncCheckpointMode

SIZES = {
    "tiny": {"size_mb": 12, "saves": 4, "pairs": 1},
    "cpu": {"size_mb": 1000, "saves": 100, "pairs": 1},
    "gpu": {"size_mb": 16000, "saves": 100, "pairs": 1},
}

GOAL = 1.1


def resident_bytes(*pids: int | None) -> int:
    """Return the proportional set size of this process and of ``pids``, summed over all ranks."""
    total = 0
    for pid in (os.getpid(), *(pid for pid in pids if pid is not None)):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += 1024 * int(line.split()[1])
    summed = torch.tensor(total)
    dist.all_reduce(summed)
    return int(summed)


def measure(saver: Saver, folder: Path, saves: int) -> list[int]:
    """Return the resident bytes of all ranks before the first save and while each one is written."""
    resident = [resident_bytes(saver.pid())]
    for number in range(saves):
        saver.begin(folder / f"save-{number}")
        saver.before_update()
        resident.append(resident_bytes(saver.pid()))
        saver.wait()
        command.empty(folder)
    return resident


def in_copies(resident: list[int], size_bytes: int) -> dict[str, float]:
    """Return the largest excess over the first figure, and its growth, in copies of the state."""
    beyond = [(later - resident[0]) / size_bytes for later in resident[1:]]
    half = len(beyond) // 2
    return {"beyond": max(beyond), "growth": max(beyond[half:]) - max(beyond[:half])}


def main() -> None:
    """Measure and print."""
    arguments = command.parse(__doc__, SIZES)
    device = command.start_ranks()
    model, optimizer = sharded_llama(model_config(arguments.size_mb), device)
    size_bytes = state_bytes(model)
    found = {}
    with command.shared_folder(arguments.dir) as folder:
        facts = machine.facts(folder)
        savers: dict[str, Saver] = {
            "ours": Ours(model, optimizer, AsyncCheckpointMode.async_pinned),
            "dcp.async_save": StockAsync(model, optimizer),
        }
        for name, saver in savers.items():
            found[name] = measure(saver, folder, arguments.saves)
            saver.close()
        buffers = host_buffers.allocations
    if dist.get_rank() == 0:
        print(
            f"{size_bytes / 1e6:.0f} MB on {dist.get_world_size()} x {device.type}; {machine.describe(facts)}"
        )
        copies = {name: in_copies(seen, size_bytes) for name, seen in found.items()}
        for name, of_arm in copies.items():
            print(f"{name:16} {of_arm['beyond']:.3f} copies beyond the state, growth {of_arm['growth']:+.3f}")
        ours, stock = (copies[name]["beyond"] for name in found)
        met = "reached" if ours <= GOAL else "NOT reached"
        print(f"goal: at most {GOAL} copies: {met}; ratio of ours to stock {ours / stock:.3g}")
        print(f"buffers made for {arguments.saves} saves of ours, on this rank: {buffers}")
        if arguments.json:
            pairs.write_json(
                arguments.json, [], machine=facts, measured=found, copies=copies, buffers=buffers
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
