"""Cost of each part of a save for concurrent steps, which explains the figures of ``bench_save.py``.

    torchrun --nproc-per-node 2 benchmarks/bench_parts.py

The steps are those of ``bench_save.py``. One of these parts begins during the first step:

  copy      only the copy to host memory, as ``async_with_pinned_mem`` makes it
  write     only digesting and writing of an existing image, in idle time
  prompt    the same at the normal priority, as when the loop waits for it
  save      a whole save

The steps are compared with as many steps without a save. The table by step shows the time of each
step relative to one without a save. Its medians over all rounds are less noisy than one round.
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
    """Work that runs concurrently with the steps."""

    def begin(self, path: Path) -> None:
        """Begin the work."""
        ...

    def before_update(self) -> None:
        """Return when tensors may change."""
        ...

    def wait(self) -> None:
        """Return when the work is done."""
        ...


class Nothing:
    """Steps without concurrent work."""

    def begin(self, path: Path) -> None:
        """Do nothing."""

    def before_update(self) -> None:
        """Do nothing."""

    def wait(self) -> None:
        """Do nothing."""


class Copy:
    """Only the copy."""

    def __init__(self, plan: SavePlanCache, tensors: dict[str, torch.Tensor]) -> None:
        assert plan.buffers is not None
        self._pairs = plan.buffers.pairs(tensors)

    def begin(self, path: Path) -> None:
        """Start the copy."""
        self._staging = overlapping(self._pairs, {})
        self._staging.start()

    def before_update(self) -> None:
        """Wait for the copy, as a loop does."""
        self._staging.before_mutation()

    def wait(self) -> None:
        """Wait for the end of the copy."""
        self._staging.finish()


class Write(Nothing):
    """Only digesting and writing."""

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
        """Wait for the write without raising its priority."""
        self._thread.join()

    def close(self) -> None:
        """End the writer."""
        self._writer.close()


def measure(part: Part, steps: Steps, folder: Path, count: int, pair: int) -> pairs.Measured:
    """Return the seconds of each of ``count`` steps, the first of which begins ``part``, and of all."""
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


def show(
    arguments: argparse.Namespace,
    found: dict[str, list[pairs.Measured]],
    facts: dict[str, Any],
    what: str,
) -> None:
    """Print the tables and write the file of ``--json``."""
    quiet = pairs.column(found["nothing"], "all_s")
    quiet_s = statistics.median(quiet) / arguments.steps
    rows, others, by_step = [], {}, {}
    for name, measured in found.items():
        each = [pairs.column(measured, f"step{number}_s") for number in range(arguments.steps)]
        by_step[name] = [statistics.median(values) / quiet_s for values in each]
        if name != "nothing":
            total = pairs.column(measured, "all_s")
            rows.append(pairs.compare(f"{name}: {arguments.steps} steps, s", total, quiet))
            others[f"{name}: more, s"] = [ours - other for ours, other in zip(total, quiet, strict=True)]
    print(f"{what}; {machine.describe(facts)}")
    print(f"{arguments.pairs} rounds of {arguments.steps} steps of {quiet_s:.3f} s")
    pairs.show(rows, reference="nothing beside", others=others)
    for name, steps in by_step.items():
        more_s = quiet_s * (sum(steps) - sum(by_step["nothing"]))
        print(f"{name} by step: {' '.join(f'{step:.2f}' for step in steps)}; in all {more_s:+.3f} s")
    if arguments.json:
        pairs.write_json(arguments.json, rows, machine=facts, measured=found, by_step=by_step, step_s=quiet_s)


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
        facts = machine.facts(folder)
    for part in (idle, prompt, save):
        part.close()
    if dist.get_rank() == 0:
        what = f"{state_bytes(model) / 1e6:.0f} MB on {dist.get_world_size()} x {device.type}"
        show(arguments, found, facts, what)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
