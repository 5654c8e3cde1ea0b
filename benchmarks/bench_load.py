"""Time of a verified load: ours, with every digest checked, against ``dcp.load`` of its own format.

    torchrun --nproc-per-node 2 benchmarks/bench_load.py

The same FSDP-sharded tensors are saved once in each format, then loaded in place, alternating.
There are two kinds: ``large``, tensors of 8 MB per rank, and ``small``, 4,096 tensors with the same
total size. ``warm`` loads read from the page cache, ``cold`` ones from the disk (the files are
dropped from the cache before each). Seconds are those of the slowest rank. The benchmark also
measures the raw limit: each rank reads the bytes of one shard file with ``preadv`` into allocated
memory.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from bench import command, machine, pairs
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from kempnerforge.checkpoint.async_save import AsyncCheckpointer
from kempnerforge.checkpoint.load.dcp_reader import SafetensorsReader, load_tensors
from kempnerforge.checkpoint.state.pieces import local_part

SIZES = {
    "tiny": {"size_mb": 4, "large_kb": 256, "small": 64, "pairs": 2},
    "cpu": {"size_mb": 1000, "large_kb": 8000, "small": 4096},
    "gpu": {"size_mb": 16000, "large_kb": 64000, "small": 4096},
}
GOALS = {"large": 1 / 3, "small": 1 / 2}

Tensors = dict[str, torch.Tensor]


def make(count: int, size_bytes: int, mesh: DeviceMesh, device: torch.device) -> Tensors:
    """Return ``count`` fp32 tensors, sharded by rows, that take ``size_bytes`` over all ranks."""
    columns = 64
    rows = max(1, size_bytes // (4 * columns * count * mesh.size()))
    return {
        f"layers.{number}.weight": DTensor.from_local(
            torch.rand(rows, columns, device=device), mesh, [Shard(0)]
        )
        for number in range(count)
    }


def save_both(tensors: Tensors, folder: Path) -> dict[str, Path]:
    """Save in both formats."""
    paths = {"ours": folder / "ours", "stock": folder / "stock"}
    checkpointer = AsyncCheckpointer()
    checkpointer.save(tensors, paths["ours"])
    checkpointer.close()
    save(dict(tensors), storage_writer=FileSystemWriter(paths["stock"]))
    return paths


def load_ours(tensors: Tensors, path: Path) -> None:
    """Load this rank's part in our format. The digest of every block is checked first."""
    load_tensors(tensors, SafetensorsReader(path))


def load_stock(tensors: Tensors, path: Path) -> None:
    """Load in DCP's format."""
    load(dict(tensors), checkpoint_id=path)


class Raw:
    """Only reads the bytes of this rank's shard file."""

    def __init__(self, size_bytes: int) -> None:
        self._memory = mmap.mmap(-1, size_bytes)
        for begin in range(0, size_bytes, mmap.PAGESIZE):  # resident, as the tensors are
            self._memory[begin] = 1
        self._view = memoryview(self._memory)

    def __call__(self, tensors: Tensors, path: Path) -> None:
        """Read in blocks of 16 MiB."""
        shard = sorted(path.glob("*.safetensors"))[dist.get_rank()]
        fd = os.open(shard, os.O_RDONLY)
        done, size = 0, min(len(self._view), os.fstat(fd).st_size)
        while done < size:
            done += os.preadv(fd, [self._view[done : min(done + machine.BLOCK_BYTES, size)]], done)
        os.close(fd)


def seconds(
    work: Callable[[Tensors, Path], None], tensors: Tensors, path: Path, *, cold: bool, device: torch.device
) -> float:
    """Return the seconds of one load on the slowest rank."""
    dist.barrier()
    if cold:
        machine.drop_cache(path)
        dist.barrier()
    started = time.perf_counter()
    work(tensors, path)
    machine.finish(device)
    took = torch.tensor(time.perf_counter() - started)
    dist.all_reduce(took, op=dist.ReduceOp.MAX)
    return took.item()


def measure(
    arm: str,
    work: Callable[[Tensors, Path], None],
    tensors: Tensors,
    path: Path,
    device: torch.device,
    pair: int,
) -> pairs.Measured:
    """Measure one round of one arm: warm, then cold. One more load warms the cache again."""
    for tensor in tensors.values():
        tensor.zero_()
    measured = {"warm_s": seconds(work, tensors, path, cold=False, device=device)}
    measured["cold_s"] = seconds(work, tensors, path, cold=True, device=device)
    work(tensors, path)
    if arm != "raw":
        assert local_part(next(iter(tensors.values()))).any(), f"{arm} loaded nothing"
    return measured


def main() -> None:
    """Measure and print."""
    arguments = command.parse(__doc__, SIZES)
    device = command.start_ranks()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    size_bytes = arguments.size_mb * 1_000_000
    counts = {
        "large": max(1, size_bytes // (arguments.large_kb * 1000 * mesh.size())),
        "small": arguments.small,
    }
    rows, measured, others = [], {}, {}
    with command.shared_folder(arguments.dir) as folder:
        facts = machine.facts(folder)
        for kind, count in counts.items():
            tensors = make(count, size_bytes, mesh, device)
            paths = save_both(tensors, folder)
            raw = Raw(size_bytes // mesh.size())
            works = {"ours": load_ours, "stock": load_stock, "raw": raw}
            found = pairs.alternate(
                {
                    arm: partial(measure, arm, work, tensors, paths.get(arm, paths["ours"]), device)
                    for arm, work in works.items()
                },
                arguments.pairs,
            )
            measured[kind] = found
            for name in ("warm_s", "cold_s"):
                values = {arm: pairs.column(found[arm], name) for arm in works}
                label = f"{kind} {name}"
                rows.append(pairs.compare(label, values["ours"], values["stock"], goal=GOALS[kind]))
                others[f"{label} raw"] = values["raw"]
                rows.append(
                    pairs.compare(
                        f"{label}, raw rate", values["raw"], values["ours"], goal=0.7, at_most=False
                    )
                )
            command.empty(folder)
    if dist.get_rank() == 0:
        print(f"{arguments.size_mb} MB on {mesh.size()} x {device.type}; {machine.describe(facts)}")
        print(f"{arguments.pairs} pairs; {counts['large']} large and {counts['small']} small tensors")
        pairs.show(rows, reference="dcp.load / ours", others=others)
        if arguments.json:
            pairs.write_json(arguments.json, rows, machine=facts, measured=measured)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
