"""AsyncCheckpointer: modes, reuse, retries, and one rank's trouble known to all."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from support.tmpfs import mounted_tmpfs
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from kempnerforge.checkpoint import arena
from kempnerforge.checkpoint.async_save import AsyncCheckpointer
from kempnerforge.checkpoint.background import Patience
from kempnerforge.checkpoint.board import LocalBoard
from kempnerforge.checkpoint.storage_reader import SafetensorsReader, load_tensors
from kempnerforge.config.schema import AsyncCheckpointMode
from kempnerforge.errors import SaveFailedError

MODES = list(AsyncCheckpointMode)
QUICK = Patience(write_tries=3, first_pause_s=0.01, save_timeout_s=30)
BIG = 24_000_000
"""Elements of a tensor whose write takes long enough to be caught in the act."""


def load_one(path: Path, like: torch.Tensor, name: str = "w") -> torch.Tensor:
    target = {name: torch.full_like(like, -1)}
    load_tensors(target, SafetensorsReader(path))
    return target[name]


@pytest.fixture
def checkpointer(request: pytest.FixtureRequest) -> Iterator[AsyncCheckpointer]:
    mode = getattr(request, "param", AsyncCheckpointMode.async_)
    made = AsyncCheckpointer(mode, patience=QUICK, stall_timeout_s=3.0)
    yield made
    made.close()


@pytest.mark.parametrize("checkpointer", MODES, indirect=True)
def test_tensors_may_change_when_save_returns(checkpointer: AsyncCheckpointer, tmp_path: Path) -> None:
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
        *((mode, 100) for mode in MODES),
        *(pytest.param(mode, 1000, marks=pytest.mark.slow) for mode in MODES[1:]),
    ],
    indirect=["checkpointer"],
)
def test_back_to_back_saves_are_never_torn(
    checkpointer: AsyncCheckpointer, tmp_path: Path, saves: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A slow writer: by the time that it looks at the buffers, the loop is steps further.
    write = checkpointer._writer.write
    monkeypatch.setattr(
        checkpointer._writer, "write", lambda *args, **more: (time.sleep(0.004), write(*args, **more))[1]
    )
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


def test_saves_after_the_first_allocate_no_buffers(checkpointer: AsyncCheckpointer, tmp_path: Path) -> None:
    state = {"w": torch.ones(50_000), "v": torch.ones(3)}
    checkpointer.prepare(state)
    assert checkpointer.host_bytes >= 200_000
    before = arena.allocations
    for step in range(20):
        checkpointer.save(state, tmp_path / f"c{step}")
    assert arena.allocations == before
    checkpointer.wait()
    assert isinstance(checkpointer._board, LocalBoard)
    assert sorted(checkpointer._board._messages) == ["19/result", "20/rank0", "20/result"]
    checkpointer.save({**state, "new": torch.ones(2)}, tmp_path / "other")
    checkpointer.wait()
    assert arena.allocations == before + 1
    assert torch.equal(load_one(tmp_path / "other", torch.ones(2), "new"), torch.ones(2))


def writer_pid(checkpointer: AsyncCheckpointer) -> int:
    deadline = time.monotonic() + 10
    while checkpointer.writer_pid is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return checkpointer.writer_pid


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_writer_that_dies_or_hangs_is_replaced(
    checkpointer: AsyncCheckpointer, tmp_path: Path, number: signal.Signals
) -> None:
    weight = torch.arange(BIG, dtype=torch.float32)
    checkpointer.save({"w": weight}, tmp_path / "first")
    checkpointer.wait()
    first = writer_pid(checkpointer)
    os.kill(first, number)
    checkpointer.save({"w": weight}, tmp_path / "second")
    checkpointer.wait()
    assert writer_pid(checkpointer) != first
    assert not Path(f"/proc/{first}").exists(), "nothing is left behind"
    assert torch.equal(load_one(tmp_path / "second", weight), weight)


def test_a_writer_killed_in_the_middle_of_a_write_is_replaced(
    checkpointer: AsyncCheckpointer, tmp_path: Path
) -> None:
    weight = torch.arange(BIG, dtype=torch.float32)
    checkpointer.begin_save({"w": weight}, tmp_path / "c")
    shard = next(iter([*tmp_path.glob(".c*")])) / "shard_00000_of_00001.safetensors"
    while not shard.exists():
        time.sleep(0.0005)
    os.kill(writer_pid(checkpointer), signal.SIGKILL)
    checkpointer.wait()
    assert torch.equal(load_one(tmp_path / "c", weight), weight)


def test_a_writer_that_always_dies_fails_the_save_and_poisons_nothing(
    checkpointer: AsyncCheckpointer, tmp_path: Path
) -> None:
    weight = torch.arange(BIG, dtype=torch.float32)
    stop = threading.Event()

    def keep_killing() -> None:
        while not stop.is_set():
            if checkpointer.writer_pid is not None:
                try:
                    os.kill(checkpointer.writer_pid, signal.SIGKILL)
                except (ProcessLookupError, TypeError):
                    time.sleep(0.0001)

    killer = threading.Thread(target=keep_killing)
    killer.start()
    try:
        checkpointer.save({"w": weight}, tmp_path / "c")
        with pytest.raises(SaveFailedError, match=r"c was not saved: rank 0: writer process died"):
            checkpointer.wait()
    finally:
        stop.set()
        killer.join()
    assert list(tmp_path.iterdir()) == []
    assert checkpointer.wait() is None
    checkpointer.save({"w": weight}, tmp_path / "d")
    assert checkpointer.wait() is not None
    assert torch.equal(load_one(tmp_path / "d", weight), weight)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted_tmpfs(tmp_path / "disk", "size=8m", lazy=True) as folder:
        yield folder


def test_a_full_disk_fails_one_save_and_leaves_nothing(
    checkpointer: AsyncCheckpointer, small_disk: Path
) -> None:
    checkpointer.save({"w": torch.ones(1_000_000)}, small_disk / "fits")
    checkpointer.wait()
    checkpointer.save({"w": torch.ones(1_000_000), "v": torch.ones(2_000_000)}, small_disk / "large")
    with pytest.raises(SaveFailedError, match=r"rank 0: .*No space left on device"):
        checkpointer.wait()
    assert [path.name for path in small_disk.iterdir()] == ["fits"]
    checkpointer.save({"w": torch.ones(900_000)}, small_disk / "fits_too")
    checkpointer.wait()
    assert torch.equal(load_one(small_disk / "fits_too", torch.ones(900_000)), torch.ones(900_000))


def test_ten_thousand_tensors_need_few_files(tmp_path: Path) -> None:
    code = (
        "import torch, sys; from pathlib import Path\n"
        "from kempnerforge.checkpoint.async_save import AsyncCheckpointer\n"
        "from kempnerforge.config.schema import AsyncCheckpointMode\n"
        "state = {f't{i}': torch.full((3,), i) for i in range(10_000)}\n"
        "c = AsyncCheckpointer(AsyncCheckpointMode.async_)\n"
        "for n in range(2): c.save(state, Path(sys.argv[1]) / f'c{n}')\n"
        "c.wait(); c.close()\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)),
    )
    names = [f"t{number}" for number in range(0, 10_000, 999)]
    loaded = {name: torch.zeros(3, dtype=torch.int64) for name in names}
    load_tensors(loaded, SafetensorsReader(tmp_path / "c1"))
    assert [int(loaded[name][0]) for name in names] == list(range(0, 10_000, 999))


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


def test_replicas_share_the_writing_evenly(tmp_path: Path) -> None:
    run_ranks(share_the_writing, 4, str(tmp_path))
    sizes = [path.stat().st_size for path in (tmp_path / "c").glob("*.safetensors")]
    assert len(sizes) == 4
    assert max(sizes) < 1.1 * min(sizes)
    assert torch.equal(load_one(tmp_path / "c", torch.ones(400, 64), "t2"), torch.full((400, 64), 2.0))


def one_rank_fails(folder: str) -> list[str]:
    made = AsyncCheckpointer(AsyncCheckpointMode.async_, patience=QUICK)
    rank, told = dist.get_rank(), []
    group = dist.new_group(backend="gloo")
    for step in range(4):
        if step == 1 and rank == 1:
            made._writer.write = fail_to_write  # type: ignore[method-assign]
        if step == 2 and rank == 1:
            del made._writer.write  # type: ignore[attr-defined]
        made.save({"w": torch.full((10,), step), f"own{rank}": torch.ones(1)}, f"{folder}/c{step}", group)
        try:
            made.wait()
            told.append("committed")
        except SaveFailedError as error:
            told.append(str(error))
    made.close()
    return told


def fail_to_write(*_: object, **__: object) -> None:
    raise OSError(5, "Input/output error")


def test_a_failure_on_one_rank_reaches_all_and_the_next_save_works(tmp_path: Path) -> None:
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


def test_a_process_group_may_be_a_subset(tmp_path: Path) -> None:
    run_ranks(save_on_a_subset, 4, str(tmp_path))
    for rank in range(4):
        loaded = load_one(tmp_path / f"pair{rank // 2}_1", torch.ones(4, dtype=torch.int64), f"r{rank}")
        assert loaded.tolist() == [rank + 10] * 4


def commit_beside_training(folder: str) -> bool:
    """A save is committed while no rank calls into the checkpointer."""
    made = AsyncCheckpointer(AsyncCheckpointMode.async_)
    made.save({"w": torch.ones(1000), f"own{dist.get_rank()}": torch.ones(3)}, f"{folder}/c")
    committed, deadline = torch.zeros(()), time.monotonic() + 20
    while not committed:
        # The training's own collectives go on meanwhile; by this one all ranks leave the loop together.
        committed = torch.tensor(float(Path(folder, "c", "manifest.json").exists()))
        late = torch.tensor(float(time.monotonic() > deadline))
        dist.all_reduce(committed, op=dist.ReduceOp.MIN)
        dist.all_reduce(late, op=dist.ReduceOp.MAX)
        if late:
            break
    dist.barrier()
    made.close()
    return bool(committed)


def test_the_commit_needs_no_call_from_the_loop(tmp_path: Path) -> None:
    assert run_ranks(commit_beside_training, 2, str(tmp_path)) == [True, True]
