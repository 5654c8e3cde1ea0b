"""What a save costs beside training: ours against stock ``dcp.async_save``, alternating, in one run.

    torchrun --nproc-per-node 2 scripts/bench_save.py --size-mb 500 --pairs 5

Both arms save the same sharded tensors (a third each of weights and two moments) while the same steps run:
some matrix products and one all-reduce. Of every save it measures, as rank 0 sees it,

  blocking_s   how long the loop stood still: the call, and the wait before the tensors change
  durable_s    from the call until the checkpoint is committed
  cpu_s        processor time of a save with no steps beside it: rank 0, its threads and its writer process
  lost_s       steps with the save minus the same number of steps without

and prints medians, spread (quartiles), and the ratio of medians. The machine's raw limit stands beside them:
the same bytes in 16 MiB direct writes and an fsync. Figures are of this machine and minute: compare ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from kempnerforge.checkpoint.async_save import AsyncCheckpointer
from kempnerforge.checkpoint.image_writer import padded, write_image
from kempnerforge.config.schema import AsyncCheckpointMode

Measured = dict[str, float]


def make_state(mesh: DeviceMesh, size_mb: int, device: torch.device) -> dict[str, torch.Tensor]:
    """``size_mb`` of fp32 tensors over all ranks: 24 weights and their two moments."""
    rows = max(1, size_mb * 250_000 // (72 * 1024 * mesh.size()))
    state = {}
    for kind in ("model", "exp_avg", "exp_avg_sq"):
        for number in range(24):
            local = torch.rand(rows, 1024, device=device)
            state[f"{kind}.layers.{number}.weight"] = DTensor.from_local(local, mesh, [Shard(0)])
    return state


def run_steps(count: int, work: torch.Tensor) -> float:
    """Seconds for ``count`` steps."""
    started = time.perf_counter()
    for _ in range(count):
        for _ in range(3):
            work = torch.tanh(work @ work)
        dist.all_reduce(work[:1])
    if work.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def cpu_seconds(*pids: int | None) -> float:
    """Processor time of this process with all its threads, and of ``pids``."""
    total = 0.0
    for pid in (os.getpid(), *(pid for pid in pids if pid is not None)):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


class Ours:
    """``AsyncCheckpointer`` in its overlapping mode."""

    def __init__(self) -> None:
        self._checkpointer = AsyncCheckpointer(AsyncCheckpointMode.async_pinned)

    def begin(self, state: dict[str, torch.Tensor], path: Path) -> None:
        """Begin a save."""
        self._checkpointer.begin_save(state, path)

    def before_update(self) -> None:
        """Stand before the tensors change."""
        self._checkpointer.wait_for_staging()

    def done(self) -> bool:
        """Whether it is committed."""
        return not self._checkpointer.is_pending

    def wait(self) -> None:
        """Until it is committed."""
        self._checkpointer.wait()

    def pid(self) -> int | None:
        """The writer process."""
        return self._checkpointer.writer_pid


class Stock:
    """``dcp.async_save`` with its defaults: a thread, fresh buffers, a gloo group of its own."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")
        self._future: Future[object] | None = None

    def begin(self, state: dict[str, torch.Tensor], path: Path) -> None:
        """Begin a save; it returns after staging."""
        assert isinstance(self._group, dist.ProcessGroup)
        future = async_save(dict(state), checkpoint_id=path, process_group=self._group)
        assert isinstance(future, Future)
        self._future = future

    def before_update(self) -> None:
        """Staging was synchronous."""

    def done(self) -> bool:
        """Whether ``.metadata`` is there."""
        return self._future is None or self._future.done()

    def wait(self) -> None:
        """Until ``.metadata`` is there."""
        if self._future is not None:
            self._future.result()

    def pid(self) -> int | None:
        """No process of its own."""
        return None


def measure(
    arm: Ours | Stock, state: dict[str, torch.Tensor], path: Path, steps: int, work: torch.Tensor
) -> Measured:
    """One save of one arm beside ``steps`` steps, and as many steps without."""
    dist.barrier()
    without_s = run_steps(steps, work)
    dist.barrier()
    started = time.perf_counter()
    arm.begin(state, path)
    blocking_s = time.perf_counter() - started
    durable_s, with_s = 0.0, blocking_s
    for number in range(steps):
        with_s += run_steps(1, work)
        if number == 0:
            waited = time.perf_counter()
            arm.before_update()
            blocking_s += time.perf_counter() - waited
            with_s += time.perf_counter() - waited
        if not durable_s and arm.done():
            durable_s = time.perf_counter() - started
    arm.wait()
    durable_s = durable_s or time.perf_counter() - started
    return {
        "blocking_s": blocking_s,
        "durable_s": durable_s,
        "lost_s": with_s - without_s,
        "step_s": without_s / steps,
    }


def idle_cpu(arm: Ours | Stock, state: dict[str, torch.Tensor], path: Path) -> float:
    """Processor time of one save with nothing beside it."""
    dist.barrier()
    before = cpu_seconds(arm.pid())
    arm.begin(state, path)
    arm.before_update()
    arm.wait()
    return cpu_seconds(arm.pid()) - before


def raw_write_s(size_bytes: int, path: Path) -> float:
    """The same bytes of one rank, in direct writes with digests, and an fsync."""
    image = torch.empty(padded(size_bytes) + 4096, dtype=torch.uint8).fill_(7)
    offset = -image.data_ptr() % 4096
    view = image[offset : offset + padded(size_bytes)].numpy().data
    started = time.perf_counter()
    write_image(view, path, size_bytes)
    return time.perf_counter() - started


def describe(values: list[float]) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{middle:8.3f} ({low:.3f} to {high:.3f})"


def report(results: dict[str, list[Measured]], raw_s: list[float]) -> None:
    """The table, for people."""
    print(f"{'':14}{'ours: median (quartiles)':>32}{'stock async_save':>32}{'ratio':>10}")
    for key in ("blocking_s", "durable_s", "cpu_s", "lost_s"):
        ours, stock = ([one[key] for one in results[name]] for name in ("ours", "stock"))
        ratio = statistics.median(ours) / statistics.median(stock)
        print(f"{key:14}{describe(ours):>32}{describe(stock):>32}{ratio:>10.2f}")
    print(f"{'raw write_s':14}{describe(raw_s):>32}   one rank's bytes, directly, with digests and fsync")
    print(f"{'step_s':14}{describe([m['step_s'] for arm in results.values() for m in arm]):>32}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size-mb", type=int, default=500, help="bytes saved, all ranks together")
    parser.add_argument("--pairs", type=int, default=5, help="saves of each arm, alternating")
    parser.add_argument("--steps", type=int, default=10, help="steps beside each save")
    parser.add_argument("--width", type=int, default=1024, help="of the square matrices of a step")
    parser.add_argument("--dir", type=Path, default=None, help="where to write; a temporary folder here")
    parser.add_argument("--json", type=Path, default=None, help="also write all measurements to this file")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    arguments = parse()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    rank = dist.get_rank()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    state = make_state(mesh, arguments.size_mb, device)
    work = torch.rand(arguments.width, arguments.width, device=device) / arguments.width
    box: list[object] = [
        tempfile.mkdtemp(dir=arguments.dir or Path.cwd(), prefix="bench-") if rank == 0 else 0
    ]
    dist.broadcast_object_list(box)
    folder = Path(str(box[0]))
    arms: dict[str, Callable[[], Ours | Stock]] = {"ours": Ours, "stock": Stock}
    made = {name: make() for name, make in arms.items()}
    results: dict[str, list[Measured]] = {name: [] for name in arms}
    raw_s: list[float] = []
    try:
        for pair in range(-1, arguments.pairs):  # the first pair warms up: imports, buffers, processes
            for name, arm in made.items():
                path = folder / f"{name}-{pair + 1}"
                measured = measure(arm, state, path, arguments.steps, work)
                measured["cpu_s"] = idle_cpu(arm, state, folder / f"{name}-{pair + 1}-idle")
                if pair >= 0:
                    results[name].append(measured)
                dist.barrier()
                if rank == 0:
                    for done in folder.iterdir():
                        shutil.rmtree(done)
                dist.barrier()
            if rank == 0 and pair >= 0:
                size_bytes = arguments.size_mb * 1_000_000 // dist.get_world_size()
                raw_s.append(raw_write_s(size_bytes, folder / "raw"))
                (folder / "raw").unlink()
            dist.barrier()
        if rank == 0:
            where = f"{dist.get_world_size()} ranks, {device.type}"
            print(f"{arguments.size_mb} MB on {where}, {arguments.pairs} pairs")
            report(results, raw_s)
            if arguments.json:
                arguments.json.write_text(json.dumps({"results": results, "raw_write_s": raw_s}, indent=1))
    finally:
        dist.barrier()
        if rank == 0:
            shutil.rmtree(folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
