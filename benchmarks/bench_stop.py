"""Time of a stop: from SIGTERM to durable, against the raw write of the same bytes, in one run.

    torchrun --nproc-per-node 2 benchmarks/bench_stop.py

Each round sends SIGTERM to the last rank while all ranks train (matrix products and an all-reduce
per step). All ranks agree on the stop after the current step and save in mode ``async``. Stops and
raw writes alternate. One clock measures:

  stop_s     from the signal until the checkpoint is committed: the rest of a step, the agreement, the save
  raw write  the same bytes, all ranks at the same time, in 16 MiB direct writes and an fsync
  step_s     steps without a signal: at most one of them is part of stop_s

The bound is 1.2 x the raw write + 2 s.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from bench import command, machine, pairs
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from kempnerforge.checkpoint.manager import CheckpointManager
from kempnerforge.checkpoint.state.train_state import TrainState
from kempnerforge.config.schema import AsyncCheckpointMode, CheckpointConfig
from kempnerforge.distributed.consensus import ControlGroup
from kempnerforge.train.termination.signals import StopSignals

SIZES = {
    "tiny": {"size_mb": 2, "steps": 2, "width": 64, "pairs": 2},
    "cpu": {"size_mb": 1000, "steps": 5, "width": 700},
    "gpu": {"size_mb": 16000, "steps": 5, "width": 16384},
}


class Weights(torch.nn.Module):
    """Sharded fp32 parameters of a third of ``size_mb`` over all ranks. AdamW adds two moments."""

    def __init__(self, size_mb: int, device: torch.device) -> None:
        super().__init__()
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        rows = max(1, size_mb * 250_000 // (72 * 1024 * mesh.size()))
        for number in range(24):
            local = torch.rand(rows, 1024, device=device)
            weight = torch.nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)]))
            self.register_parameter(f"weight_{number}", weight)


class Loop:
    """A loop without real training that agrees after every step and saves at a stop request."""

    def __init__(self, folder: Path, size_mb: int, width: int, device: torch.device) -> None:
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        self._control = ControlGroup(group)
        model = Weights(size_mb, device)
        self._state = TrainState(model=model, optimizer=torch.optim.AdamW(model.parameters()), device=device)
        config = CheckpointConfig(interval=0, async_mode=AsyncCheckpointMode.async_, keep_last_n=1)
        self._manager = CheckpointManager(config, state=self._state, run_dir=folder, control_group=group)
        self._manager.resume(self._state)
        self._signals = StopSignals()
        self._signals.install()
        self._work = torch.rand(width, width, device=device) / width
        self.size_bytes = 0
        self.step_s: list[float] = []

    def until_stopped(self, steps_before: int) -> float:
        """Train until the last rank gets SIGTERM in a step. Return the seconds from then to the commit."""
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
        # One clock: both times are measured on the rank that got the signal.
        return max(self._control.gather(durable - sent if is_last else 0.0))

    def close(self) -> None:
        """End the writer."""
        self._manager.close()


def main() -> None:
    """Measure and print."""
    arguments = command.parse(__doc__, SIZES)
    device = command.start_ranks()
    with command.shared_folder(arguments.dir) as folder:
        loop = Loop(folder, arguments.size_mb, arguments.width, device)

        def raw(_pair: int) -> pairs.Measured:
            path, size_bytes = folder / f"raw_{dist.get_rank()}", loop.size_bytes // dist.get_world_size()
            return {"s": machine.raw_write_s(path, size_bytes, barrier=dist.barrier)}

        arms = {"stop": lambda _pair: {"s": loop.until_stopped(arguments.steps)}, "raw": raw}
        loop.until_stopped(arguments.steps)  # after this, the size is known and the writer has started
        found = pairs.alternate(arms, arguments.pairs)
        facts = machine.facts(folder)
        loop.close()
    if dist.get_rank() == 0:
        stop_s, raw_s = (pairs.column(found[arm], "s") for arm in arms)
        rows = [
            pairs.compare("stop_s", stop_s, raw_s),
            pairs.compare("stop_s / bound", stop_s, [1.2 * s + 2 for s in raw_s], goal=1.0),
        ]
        where = f"{loop.size_bytes / 1e6:.0f} MB on {dist.get_world_size()} x {device.type}"
        print(f"{where}; {machine.describe(facts)}\n{arguments.pairs} pairs; bound: 1.2 x raw write + 2 s")
        pairs.show(rows, reference="raw write, bound", others={"step_s": loop.step_s})
        if arguments.json:
            rest = {"measured": found, "step_s": loop.step_s, "size_bytes": loop.size_bytes}
            pairs.write_json(arguments.json, rows, machine=facts, **rest)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
