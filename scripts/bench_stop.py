"""How long a stop takes: from SIGTERM to durable, against the raw write of the same bytes, in one run.

    torchrun --nproc-per-node 2 scripts/bench_stop.py --size-mb 500 --pairs 5

Each round sends SIGTERM to the last rank while all train (matrix products and an all-reduce a step), and all
agree on it after the step under way and save. Of every round it measures, by one clock,

  stop_s     from the signal until the checkpoint is committed: the rest of a step, the agreement, the save
  step_s     the median of steps without a signal: at most one of them is part of stop_s
  raw_s      the same bytes, each rank its share at the same time, in 16 MiB direct writes and an fsync

alternating. It prints medians, spread (quartiles), the ratio, and whether stop_s is within 1.2 x raw_s + 2 s.
Figures are of this machine and minute: compare ratios.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import signal
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from kempnerforge.checkpoint.image_writer import padded
from kempnerforge.checkpoint.manager import CheckpointManager
from kempnerforge.checkpoint.state import TrainState
from kempnerforge.config.schema import AsyncCheckpointMode, CheckpointConfig
from kempnerforge.distributed.control import ControlGroup
from kempnerforge.train.stop import StopSignals

BLOCK_BYTES = 16 << 20


class Weights(torch.nn.Module):
    """Sharded fp32 parameters, a third of ``size_mb`` over all ranks: AdamW adds two moments."""

    def __init__(self, size_mb: int, device: torch.device) -> None:
        super().__init__()
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        rows = max(1, size_mb * 250_000 // (72 * 1024 * mesh.size()))
        for number in range(24):
            local = torch.rand(rows, 1024, device=device)
            weight = torch.nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)]))
            self.register_parameter(f"weight_{number}", weight)


class Loop:
    """A loop that trains nothing, agrees after every step, and saves when it is asked to stop."""

    def __init__(self, folder: Path, size_mb: int, width: int, mode: str, device: torch.device) -> None:
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        self._control = ControlGroup(group)
        model = Weights(size_mb, device)
        self._state = TrainState(model=model, optimizer=torch.optim.AdamW(model.parameters()), device=device)
        config = CheckpointConfig(interval=0, async_mode=AsyncCheckpointMode(mode), keep_last_n=1)
        self._manager = CheckpointManager(config, state=self._state, run_dir=folder, control_group=group)
        self._manager.resume(self._state)
        self._signals = StopSignals()
        self._signals.install()
        self._work = torch.rand(width, width, device=device) / width
        self.size_bytes = 0
        self.step_s: list[float] = []

    def until_stopped(self, steps_before: int) -> float:
        """Train; the last rank gets SIGTERM in the middle of a step. Returns seconds until the commit."""
        self._signals.received = 0
        is_last = dist.get_rank() == dist.get_world_size() - 1
        sent, number = 0.0, 0
        while True:
            started = time.monotonic()
            for part in range(4):
                self._work = torch.tanh(self._work @ self._work)
                if is_last and number == steps_before and part == 1:
                    sent = time.monotonic()
                    os.kill(os.getpid(), signal.SIGTERM)
            dist.all_reduce(self._work[:1])
            if self._work.is_cuda:
                torch.cuda.synchronize()
            self._state.advance()
            if self._control.agree([self._signals.received])[0]:
                break
            self.step_s.append(time.monotonic() - started)
            number += 1
        report = self._manager.save(self._state, wait=True, reason="stop: SIGTERM")
        durable = time.monotonic()
        self.size_bytes = report.size_bytes
        # One clock: the signal and the end are taken on the rank that got it.
        return max(self._control.gather(durable - sent if is_last else 0.0))

    def close(self) -> None:
        """End the writer."""
        self._manager.close()


def raw_write_s(path: Path, size_bytes: int) -> float:
    """Seconds to write ``size_bytes`` of this rank directly, and to make them durable."""
    size_bytes = padded(size_bytes)
    image = mmap.mmap(-1, max(size_bytes, BLOCK_BYTES))
    image.write(os.urandom(1 << 20) * (len(image) >> 20))
    view = memoryview(image)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        fd = os.open(path, flags | os.O_DIRECT, 0o666)
    except OSError:  # tmpfs and some network file systems: the engine writes through the cache there, too
        fd = os.open(path, flags, 0o666)
    dist.barrier()
    started = time.monotonic()
    done = 0
    while done < size_bytes:
        done += os.write(fd, view[done : min(done + BLOCK_BYTES, size_bytes)])
    os.fsync(fd)
    os.close(fd)
    dist.barrier()
    took_s = time.monotonic() - started
    path.unlink()
    return took_s


def describe(values: list[float]) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{middle:8.3f} ({low:.3f} to {high:.3f})"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size-mb", type=int, default=500, help="bytes saved, all ranks together")
    parser.add_argument("--pairs", type=int, default=5, help="stops and raw writes, alternating")
    parser.add_argument("--steps", type=int, default=5, help="steps before each signal")
    parser.add_argument("--width", type=int, default=1024, help="of the square matrices of a step")
    parser.add_argument("--mode", choices=[mode.value for mode in AsyncCheckpointMode], default="async")
    parser.add_argument("--dir", type=Path, default=None, help="where to write; a temporary folder here")
    parser.add_argument("--json", type=Path, default=None, help="also write all measurements to this file")
    return parser.parse_args()


def report(found: dict[str, list[float]], size_bytes: int) -> None:
    """The table, for people."""
    for name, values in found.items():
        print(f"{name:8}{describe(values):>32}")
    stop_s, raw_s = (statistics.median(found[name]) for name in ("stop_s", "raw_s"))
    bound_s = 1.2 * raw_s + 2
    met = "within" if stop_s <= bound_s else "NOT within"
    print(
        f"{size_bytes / 1e6:.1f} MB on {dist.get_world_size()} ranks; stop / raw: ratio {stop_s / raw_s:.2f}"
    )
    print(f"median stop of {stop_s:.3f} s is {met} 1.2 x raw + 2 s = {bound_s:.3f} s")


def main() -> None:
    """Measure and print."""
    arguments = parse()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    box = [tempfile.mkdtemp(dir=arguments.dir or Path.cwd(), prefix="bench-") if rank == 0 else ""]
    dist.broadcast_object_list(box)
    folder = Path(box[0])
    loop = Loop(folder, arguments.size_mb, arguments.width, arguments.mode, device)
    found: dict[str, list[float]] = {"stop_s": [], "raw_s": []}
    try:
        for pair in range(-1, arguments.pairs):  # the first pair warms up: the writer process starts
            stop_s = loop.until_stopped(arguments.steps)
            raw_s = raw_write_s(folder / f"raw_{rank}", loop.size_bytes // num_ranks)
            if pair >= 0:
                found["stop_s"].append(stop_s)
                found["raw_s"].append(raw_s)
        if rank == 0:
            found["step_s"] = loop.step_s
            report(found, loop.size_bytes)
            if arguments.json:
                measured = {**found, "size_bytes": loop.size_bytes, "num_ranks": num_ranks}
                arguments.json.write_text(json.dumps(measured, indent=1))
    finally:
        loop.close()
        dist.barrier()
        if rank == 0:
            shutil.rmtree(folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
