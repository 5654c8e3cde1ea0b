"""AsyncCheckpointer: modes, reuse, retries, and one rank's trouble reported to all."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from support.crash.file_operations import install, uninstall
from support.crash.file_watcher import Control, Watch
from support.polling import wait_until
from support.ranks import gloo_group, run_ranks
from support.tmpfs import mounted_tmpfs
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from kempnerforge.checkpoint.async_save import AsyncCheckpointer
from kempnerforge.checkpoint.load.dcp_reader import SafetensorsReader, load_tensors
from kempnerforge.checkpoint.save import host_buffers, writer_client
from kempnerforge.checkpoint.save.pipeline import RetryPolicy
from kempnerforge.checkpoint.save.writer_client import Writer
from kempnerforge.config.schema import AsyncCheckpointMode
from kempnerforge.distributed.store_channel import LocalBoard
from kempnerforge.errors import SaveFailedError

pytestmark = pytest.mark.smoke

MODES = list(AsyncCheckpointMode)
QUICK = RetryPolicy(write_tries=3, first_pause_s=0.01, save_timeout_s=60)


def load_one(path: Path, like: torch.Tensor, name: str = "w") -> torch.Tensor:
    target = {name: torch.full_like(like, -1)}
    load_tensors(target, SafetensorsReader(path))
    return target[name]


@pytest.fixture
def checkpointer(request: pytest.FixtureRequest) -> Iterator[AsyncCheckpointer]:
    mode = getattr(request, "param", AsyncCheckpointMode.async_)
    made = AsyncCheckpointer(mode, patience=QUICK, stall_timeout_s=60.0)
    yield made
    made.close()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A folder whose writers ``faults`` hits."""
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.fixture
def faults(tmp_path: Path, run_dir: Path) -> Iterator[Control]:
    """Arms faults of this process, ``rank0``, and of its writer, ``writer0``, below ``run_dir``."""
    control = Control(tmp_path / "control")
    install(Watch(str(run_dir), str(tmp_path / "log"), str(tmp_path / "control"), "rank0"))
    yield control
    uninstall()


@pytest.mark.parametrize("checkpointer", MODES, indirect=True)
def test_save_returned_tensors_may_change(checkpointer: AsyncCheckpointer, tmp_path: Path) -> None:
    weight = torch.zeros(1_000_000)
    for step in range(5):
        weight.fill_(step)
        checkpointer.save({"w": weight, "step": step}, tmp_path / f"c{step}")
        weight.fill_(-7)
        # In this order: it may end between the two looks.
        if checkpointer.blocks or checkpointer.poll() is not None:
            assert not checkpointer.is_pending
        assert checkpointer.is_pending or checkpointer.blocks or checkpointer.poll() is not None
    checkpointer.wait()
    assert not checkpointer.is_pending
    for step in range(5):
        assert torch.equal(load_one(tmp_path / f"c{step}", weight), torch.full_like(weight, step))
        assert SafetensorsReader(tmp_path / f"c{step}").objects == {"step": step}
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"c{step}" for step in range(5)]


@pytest.mark.parametrize(
    ("checkpointer", "saves"),
    [
        *((mode, 40) for mode in MODES),
        *(pytest.param(mode, 1000, marks=pytest.mark.slow) for mode in MODES[1:]),
    ],
    indirect=["checkpointer"],
)
def test_saves_back_to_back_are_never_torn(
    checkpointer: AsyncCheckpointer, tmp_path: Path, saves: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A slow writer: by the time that it looks at the buffers, the loop is steps further.
    write = Writer.write
    monkeypatch.setattr(Writer, "write", lambda *args, **more: (time.sleep(0.004), write(*args, **more))[1])
    tensors = {f"p{number}": torch.zeros(257, 3) for number in range(5)}
    for step in range(saves):
        checkpointer.wait_for_staging()
        for tensor in tensors.values():
            tensor.fill_(step)
        path = tmp_path / f"c{step}"
        checkpointer.begin_save(tensors, path)
        if step >= 2:
            done = tmp_path / f"c{step - 2}"
            loaded = {name: torch.full_like(tensor, -1) for name, tensor in tensors.items()}
            load_tensors(loaded, SafetensorsReader(done))
            assert {float(value) for tensor in loaded.values() for value in tensor.unique()} == {step - 2}
            shutil.rmtree(done)
    checkpointer.wait()


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Keys of the messages that have been posted and not been forgotten."""
    kept: set[str] = set()
    post, forget = LocalBoard.post, LocalBoard.forget
    monkeypatch.setattr(
        LocalBoard, "post", lambda self, key, message: (kept.add(key), post(self, key, message))[1]
    )
    monkeypatch.setattr(LocalBoard, "forget", lambda self, key: (kept.discard(key), forget(self, key))[1])
    return kept


def test_buffers_after_first_save_are_reused(
    messages: set[str], checkpointer: AsyncCheckpointer, tmp_path: Path
) -> None:
    """Saves after the first allocate no buffers, and the messages of earlier ones are forgotten."""
    state = {"w": torch.ones(50_000), "v": torch.ones(3)}
    checkpointer.prepare(state)
    assert checkpointer.host_bytes >= 200_000
    before = host_buffers.allocations
    for step in range(20):
        checkpointer.save(state, tmp_path / f"c{step}")
    assert host_buffers.allocations == before
    checkpointer.wait()
    assert sorted(messages) == ["19/result", "20/folder", "20/rank0", "20/result"]
    checkpointer.save({**state, "new": torch.ones(2)}, tmp_path / "other")
    checkpointer.wait()
    assert host_buffers.allocations == before + 1
    assert torch.equal(load_one(tmp_path / "other", torch.ones(2), "new"), torch.ones(2))


def writer_pid(checkpointer: AsyncCheckpointer) -> int:
    wait_until(lambda: checkpointer.writer_pid is not None, "a writer")
    assert checkpointer.writer_pid is not None
    return checkpointer.writer_pid


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_writer_dies_or_hangs_is_replaced(
    checkpointer: AsyncCheckpointer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    weight = torch.arange(1000, dtype=torch.float32)
    checkpointer.save({"w": weight}, tmp_path / "first")
    checkpointer.wait()
    first = writer_pid(checkpointer)
    os.kill(first, number)
    os.waitid(os.P_PID, first, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
    skipped_s = 0.0

    def monotonic() -> float:
        """A minute goes by at every look at the first writer; any other has the time that it takes."""
        nonlocal skipped_s
        skipped_s += 100.0 if checkpointer.writer_pid == first else 0.0
        return time.monotonic() + skipped_s

    monkeypatch.setattr(writer_client, "time", SimpleNamespace(monotonic=monotonic))
    checkpointer.save({"w": weight}, tmp_path / "second")
    checkpointer.wait()
    assert writer_pid(checkpointer) != first
    wait_until(lambda: not Path(f"/proc/{first}").exists(), "an end of the first writer")
    assert torch.equal(load_one(tmp_path / "second", weight), weight)


def test_writer_killed_in_mid_write_is_replaced(
    checkpointer: AsyncCheckpointer, run_dir: Path, faults: Control
) -> None:
    weight = torch.arange(5000, dtype=torch.float32)
    checkpointer.save({"w": weight}, run_dir / "first")
    checkpointer.wait()
    first = writer_pid(checkpointer)
    faults.arm("writer0", 0, "kill_half")
    checkpointer.save({"w": weight}, run_dir / "c")
    checkpointer.wait()
    assert faults.fired == 1
    assert writer_pid(checkpointer) != first
    assert torch.equal(load_one(run_dir / "c", weight), weight)


def test_writer_always_dies_only_that_save_fails(
    checkpointer: AsyncCheckpointer, run_dir: Path, faults: Control
) -> None:
    weight = torch.arange(5000, dtype=torch.float32)
    faults.arm("writer0", 0, "kill", count=1000)
    checkpointer.save({"w": weight}, run_dir / "c")
    with pytest.raises(SaveFailedError, match=r"c was not saved: rank 0: writer process died"):
        checkpointer.wait()
    assert faults.fired == QUICK.write_tries
    faults.disarm()
    assert list(run_dir.iterdir()) == []
    assert checkpointer.wait() is None
    checkpointer.save({"w": weight}, run_dir / "d")
    assert checkpointer.wait() is not None
    assert torch.equal(load_one(run_dir / "d", weight), weight)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted_tmpfs(tmp_path / "disk", "size=8m", lazy=True) as folder:
        yield folder


def test_save_disk_full_fails_and_leaves_nothing(checkpointer: AsyncCheckpointer, small_disk: Path) -> None:
    checkpointer.save({"w": torch.ones(1_000_000)}, small_disk / "fits")
    checkpointer.wait()
    checkpointer.save({"w": torch.ones(1_000_000), "v": torch.ones(2_000_000)}, small_disk / "large")
    with pytest.raises(SaveFailedError, match=r"rank 0: .*No space left on device"):
        checkpointer.wait()
    assert [path.name for path in small_disk.iterdir()] == ["fits"]
    checkpointer.save({"w": torch.ones(900_000)}, small_disk / "fits_too")
    checkpointer.wait()
    assert torch.equal(load_one(small_disk / "fits_too", torch.ones(900_000)), torch.ones(900_000))


@pytest.fixture
def few_open_files() -> Iterator[None]:
    """Room for 64 more open files in this process, and for as many in what it starts."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 64, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.usefixtures("few_open_files")
def test_save_many_tensors_needs_few_open_files(checkpointer: AsyncCheckpointer, tmp_path: Path) -> None:
    state = {f"t{number}": torch.full((3,), number) for number in range(2000)}
    for number in range(2):
        checkpointer.save(state, tmp_path / f"c{number}")
    checkpointer.wait()
    names = [f"t{number}" for number in range(0, 2000, 199)]
    loaded = {name: torch.zeros(3, dtype=torch.int64) for name in names}
    load_tensors(loaded, SafetensorsReader(tmp_path / "c1"))
    assert [int(loaded[name][0]) for name in names] == list(range(0, 2000, 199))


def share_the_writing(folder: str) -> int:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    sizes = [1000, 400, 400, 200, 100, 60, 60, 20]
    state = {
        f"t{number}": distribute_tensor(torch.full((size, 64), float(number)), mesh, [Replicate(), Shard(0)])
        for number, size in enumerate(sizes)
    }
    made = AsyncCheckpointer(AsyncCheckpointMode.async_pinned)
    made.save(state, Path(folder) / "c")
    made.wait()
    host_bytes = made.host_bytes
    made.close()
    return host_bytes


def test_save_replicas_share_writing_evenly(tmp_path: Path) -> None:
    run_ranks(share_the_writing, 4, str(tmp_path))
    sizes = [path.stat().st_size for path in (tmp_path / "c").glob("*.safetensors")]
    assert len(sizes) == 4
    assert max(sizes) < 1.1 * min(sizes)
    assert torch.equal(load_one(tmp_path / "c", torch.ones(400, 64), "t2"), torch.full((400, 64), 2.0))


def one_rank_fails(folder: str) -> list[str]:
    made = AsyncCheckpointer(AsyncCheckpointMode.async_, patience=QUICK)
    rank, outcomes = dist.get_rank(), []
    group = gloo_group()
    for step in range(4):
        with pytest.MonkeyPatch.context() as patch:
            if step == 1 and rank == 1:
                patch.setattr(Writer, "write", fail_to_write)
            state = {"w": torch.full((10,), step), f"own{rank}": torch.ones(1)}
            made.save(state, f"{folder}/c{step}", group)
            try:
                made.wait()
                outcomes.append("committed")
            except SaveFailedError as error:
                outcomes.append(str(error))
    made.close()
    return outcomes


def fail_to_write(*_: object, **__: object) -> None:
    raise OSError(5, "Input/output error")


def test_save_one_rank_fails_all_ranks_raise(tmp_path: Path) -> None:
    first, second = run_ranks(one_rank_fails, 2, str(tmp_path))
    assert first == second
    assert first[0] == first[2] == first[3] == "committed"
    assert first[1] == "c1 was not saved: rank 1: [Errno 5] Input/output error"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c0", "c2", "c3"]


def save_on_a_subset(folder: str) -> None:
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1], backend="gloo"), dist.new_group([2, 3], backend="gloo")]
    group = pairs[rank // 2]
    assert isinstance(group, dist.ProcessGroup)
    made = AsyncCheckpointer(AsyncCheckpointMode.async_)
    for step in range(2):
        made.save({f"r{rank}": torch.full((4,), rank + 10 * step)}, f"{folder}/pair{rank // 2}_{step}", group)
    made.wait()
    made.close()


def test_save_subset_process_group_commits(tmp_path: Path) -> None:
    run_ranks(save_on_a_subset, 4, str(tmp_path))
    for rank in range(4):
        loaded = load_one(tmp_path / f"pair{rank // 2}_1", torch.ones(4, dtype=torch.int64), f"r{rank}")
        assert loaded.tolist() == [rank + 10] * 4


def commit_beside_training(folder: str) -> None:
    """A save is committed while no rank calls into the checkpointer."""
    made = AsyncCheckpointer(AsyncCheckpointMode.async_)
    made.save({"w": torch.ones(1000), f"own{dist.get_rank()}": torch.ones(3)}, f"{folder}/c")

    def is_committed() -> bool:
        # The training's own collectives continue meanwhile; by this one all ranks leave the loop together.
        committed = torch.tensor(float(Path(folder, "c", "manifest.json").exists()))
        dist.all_reduce(committed, op=dist.ReduceOp.MIN)
        return bool(committed)

    wait_until(is_committed, "a commit without a call from the loop")
    dist.barrier()
    made.close()


def test_commit_without_call_from_loop_completes(tmp_path: Path) -> None:
    run_ranks(commit_beside_training, 2, str(tmp_path))
