"""Which part of a save costs the steps beside it what: the profile behind the figures of ``bench_save.py``.

    torchrun --nproc-per-node 2 benchmarks/bench_parts.py

The same steps as there, of which the first has beside it

  copy      the copy to host memory alone, as ``async_with_pinned_mem`` makes it
  write     digesting and writing alone, of an image that is there already, in idle time
  prompt    the same at an ordinary priority, as when somebody waits for it
  save      a whole save

against as many steps with nothing beside. The line by step is of medians over all rounds, which is less noisy
than a round: how long each step takes, of one without.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from bench import command, machine, pairs
from bench.savers import Ours
from bench.workload import Steps, model_config, sharded_llama, state_bytes

from kempnerforge.checkpoint.results import Payload
from kempnerforge.checkpoint.save.plan import SavePlanCache
from kempnerforge.checkpoint.save.staging import overlapping
from kempnerforge.checkpoint.save.writer_client import Writer
from kempnerforge.checkpoint.state.train_state import TrainState
from kempnerforge.config.schema import AsyncCheckpointMode
from kempnerforge.distributed.consensus import ControlGroup

SIZES = {
    "tiny": {"size_mb": 3, "width": 64, "steps": 3, "pairs": 2},
    "cpu": {"size_mb": 1000, "width": 950, "steps": 20},
    "gpu": {"size_mb": 16000, "width": 16384, "steps": 20},
}


class Part(Protocol):
    """What goes on beside the steps."""

    def begin(self, path: Path) -> None:
        """Begin."""
        ...

    def before_update(self) -> None:
        """Return when tensors may change."""
        ...

    def wait(self) -> None:
        """Return at its end."""
        ...


class Nothing:
    """Steps alone."""

    def begin(self, path: Path) -> None:
        """Nothing."""

    def before_update(self) -> None:
        """Nothing."""

    def wait(self) -> None:
        """Nothing."""


class Copy:
    """The copy alone."""

    def __init__(self, plan: SavePlanCache, tensors: dict[str, torch.Tensor]) -> None:
        assert plan.buffers is not None
        self._pairs = plan.buffers.pairs(tensors)

    def begin(self, path: Path) -> None:
        """Start it."""
        self._staging = overlapping(self._pairs, {})
        self._staging.start()

    def before_update(self) -> None:
        """Wait for it, as a loop does."""
        self._staging.before_mutation()

    def wait(self) -> None:
        """Wait for all of it."""
        self._staging.finish()


class Write(Nothing):
    """Digests and writes alone."""

    def __init__(self, plan: SavePlanCache, *, prompt: bool) -> None:
        assert plan.buffers is not None
        self._buffers, self._prompt = plan.buffers.buffers, prompt
        self._writer = Writer(stall_timeout_s=120)

    def begin(self, path: Path) -> None:
        """Start it."""
        self._writer.set_priority(urgent=self._prompt)
        self._thread = threading.Thread(target=self._write, args=[path])
        self._thread.start()

    def _write(self, path: Path) -> None:
        for buffer in self._buffers:
            file = path.with_name(f"{path.name}-{buffer.file.name}")
            self._writer.write(buffer.fd, file, buffer.image.size_bytes)

    def wait(self) -> None:
        """Wait for it, without hurrying it."""
        self._thread.join()

    def close(self) -> None:
        """End the writer."""
        self._writer.close()


def measure(part: Part, steps: Steps, folder: Path, count: int, pair: int) -> pairs.Measured:
    """Seconds of each of ``count`` steps, the first of which has ``part`` beside it, and of all."""
    dist.barrier()
    times = [time.perf_counter()]
    part.begin(folder / str(pair))
    for number in range(count):
        steps.forward_backward()
        if number == 0:
            part.before_update()
        steps.update()
        times.append(time.perf_counter())
    part.wait()
    command.empty(folder)
    each = {f"step{k}_s": end - begin for k, (begin, end) in enumerate(itertools.pairwise(times))}
    return {**each, "all_s": times[-1] - times[0]}


def tell(
    arguments: argparse.Namespace, found: dict[str, list[pairs.Measured]], told: dict[str, Any], what: str
) -> None:
    """Print, and write what ``--json`` asks for."""
    quiet = pairs.column(found["nothing"], "all_s")
    quiet_s = statistics.median(quiet) / arguments.steps
    rows, others, by_step = [], {}, {}
    for name, measured in found.items():
        each = [pairs.column(measured, f"step{number}_s") for number in range(arguments.steps)]
        by_step[name] = [statistics.median(values) / quiet_s for values in each]
        if name != "nothing":
            total = pairs.column(measured, "all_s")
            rows.append(pairs.compare(f"{name}: {arguments.steps} steps, s", total, quiet))
            others[f"{name}: more, s"] = [one - other for one, other in zip(total, quiet, strict=True)]
    print(f"{what}; {machine.tell(told)}")
    print(f"{arguments.pairs} rounds of {arguments.steps} steps of {quiet_s:.3f} s")
    pairs.show(rows, reference="nothing beside", others=others)
    for name, steps in by_step.items():
        more_s = quiet_s * (sum(steps) - sum(by_step["nothing"]))
        print(f"{name} by step: {' '.join(f'{step:.2f}' for step in steps)}; in all {more_s:+.3f} s")
    if arguments.json:
        pairs.write_json(arguments.json, rows, machine=told, measured=found, by_step=by_step, step_s=quiet_s)


def main() -> None:
    """Measure and print."""
    arguments = command.parse(__doc__, SIZES)
    device = command.start_ranks()
    model, optimizer = sharded_llama(model_config(arguments.size_mb), device)
    tensors = TrainState(model=model, optimizer=optimizer).tensors()
    plan = SavePlanCache()
    plan.update(Payload(tensors))
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    plan.agree(ControlGroup(group), None)
    save = Ours(model, optimizer, AsyncCheckpointMode.async_pinned)
    idle, prompt = Write(plan, prompt=False), Write(plan, prompt=True)
    parts: dict[str, Part] = {"nothing": Nothing(), "copy": Copy(plan, tensors)}
    parts |= {"write": idle, "prompt": prompt, "save": save}
    steps = Steps(arguments.width, device)
    with command.shared_folder(arguments.dir) as folder:
        arms = {name: partial(measure, part, steps, folder, arguments.steps) for name, part in parts.items()}
        found = pairs.alternate(arms, arguments.pairs)
        told = machine.facts(folder)
    for part in (idle, prompt, save):
        part.close()
    if dist.get_rank() == 0:
        what = f"{state_bytes(model) / 1e6:.0f} MB on {dist.get_world_size()} x {device.type}"
        tell(arguments, found, told, what)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
