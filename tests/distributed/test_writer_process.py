"""What the writer takes from the training's steps: huge pages, and time that nobody else wants."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from concurrent.futures import Executor
from pathlib import Path

import numpy as np
import pytest
import torch
from support.clock import FakeClock
from support.polling import wait_until

from kempnerforge.checkpoint.async_save import AsyncCheckpointer
from kempnerforge.checkpoint.save import direct_io, shared_memory, writer_client
from kempnerforge.checkpoint.save.direct_io import WriterThreads, write_image
from kempnerforge.checkpoint.save.shared_memory import HUGE_BYTES, map_filled, map_new
from kempnerforge.checkpoint.save.writer_process import PROGRESS_BYTES, SharedProgress, serve
from kempnerforge.config.schema import AsyncCheckpointMode

pytestmark = pytest.mark.smoke

SIZE_BYTES = 3 * HUGE_BYTES + 8192


@pytest.fixture
def fd() -> Iterator[int]:
    number = os.memfd_create("test")
    os.ftruncate(number, SIZE_BYTES)
    yield number
    os.close(number)


def smaps_of(view: memoryview) -> dict[str, int]:
    return smaps_at(np.frombuffer(view, dtype=np.uint8).ctypes.data)


def smaps_at(address: int) -> dict[str, int]:
    """By field, the bytes that the kernel counts of the mapping that begins there; nothing if none does."""
    found: dict[str, int] = {}
    for mapping in Path("/proc/self/smaps").read_text().split("VmFlags:"):
        lines = [line.split() for line in mapping.splitlines() if " kB" in line or "-" in line.split(" ")[0]]
        if lines and lines[0][0].split("-")[0] == f"{address:x}":
            found = {name.rstrip(":"): 1024 * int(number) for name, number, _ in lines[1:]}
    return found


def test_shared_memory_two_mappings_one_memory_huge_pages(fd: int) -> None:
    filled, seen = map_new(fd, SIZE_BYTES), map_filled(fd, SIZE_BYTES)
    assert filled.nbytes == seen.nbytes == SIZE_BYTES
    assert not any(seen)
    filled[5] = filled[-1] = 7
    assert (seen[5], seen[-1], sum(seen)) == (7, 7, 14)
    with pytest.raises(TypeError):
        seen[0] = 1
    huge = smaps_of(filled)["ShmemPmdMapped"]
    if not huge:
        pytest.skip("this kernel does not give huge pages of shared memory to who asks (Linux 6.1)")
    assert huge == smaps_of(seen)["ShmemPmdMapped"] == 3 * HUGE_BYTES


def test_shared_memory_huge_pages_refused_uses_small(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "_MADV_COLLAPSE", 12345)  # EINVAL, as before Linux 6.1
    filled = map_new(fd, SIZE_BYTES)
    filled[0] = filled[-1] = 9  # two mappings to the kernel, which is asked for huge pages of the first alone
    assert map_filled(fd, SIZE_BYTES)[-1] == 9
    assert smaps_of(filled)["Rss"] > 0


def test_shared_memory_lives_as_long_as_its_tensors(fd: int) -> None:
    tensor = torch.frombuffer(map_new(fd, SIZE_BYTES), dtype=torch.uint8)
    address = tensor.data_ptr()
    assert smaps_at(address)["Size"] >= 3 * HUGE_BYTES
    tensor.fill_(3)
    part = tensor[-1:]
    del tensor
    assert int(part) == 3
    del part
    assert smaps_at(address) == {}


def test_shared_memory_not_mappable_is_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(4096))
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    before = Path("/proc/self/maps").read_text().count("\n")
    with pytest.raises(OSError, match="mmap"):
        map_new(fd, 4096)
    os.close(fd)
    assert Path("/proc/self/maps").read_text().count("\n") <= before + 1


def write(path: Path, fd: int, threads: WriterThreads, blocks: int, **options: object) -> None:
    size_bytes = (blocks - 1) * direct_io.BLOCK_BYTES + 5
    os.ftruncate(fd, direct_io.padded(size_bytes))
    write_image(map_new(fd, direct_io.padded(size_bytes)), path, size_bytes, threads, **options)  # type: ignore[arg-type]
    assert path.stat().st_size == size_bytes


class Noted(WriterThreads):
    def __init__(self) -> None:
        super().__init__()
        self.urgent: list[bool] = []

    def pick(self, *, urgent: bool) -> Executor:
        self.urgent.append(urgent)
        return super().pick(urgent=urgent)


def test_writer_threads_have_requested_priority() -> None:
    threads = WriterThreads()
    policies = [threads.pick(urgent=one).submit(os.sched_getscheduler, 0).result() for one in (True, False)]
    assert policies == [os.SCHED_OTHER, os.SCHED_IDLE]
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """For ``write_image``, with small blocks."""
    monkeypatch.setattr(direct_io, "BLOCK_BYTES", 1 << 16)
    return FakeClock().replace_in(monkeypatch, direct_io)


@pytest.mark.usefixtures("clock")
def test_write_image_asks_before_each_block(tmp_path: Path, fd: int) -> None:
    """It is asked before each block whether somebody waits."""
    threads, answers = Noted(), iter([False, True, False])
    write(tmp_path / "f", fd, threads, 3, is_urgent=lambda: next(answers))
    assert threads.urgent == [False, True, False]


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("refused", [1, 2])
def test_write_image_refused_direct_write_is_buffered(
    tmp_path: Path, fd: int, monkeypatch: pytest.MonkeyPatch, refused: int
) -> None:
    """Some file systems open a file for direct writes and refuse the writes."""
    pwrite, kinds = os.pwrite, []

    def refuse_direct(fd: int, data: memoryview, offset: int) -> int:
        kinds.append(bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT))
        if kinds[-1] and sum(kinds) >= refused:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", refuse_direct)
    path = tmp_path / "f"
    if not opens_direct(tmp_path):
        pytest.skip("the file system of the test opens no file for direct writes")
    write(path, fd, WriterThreads(), 4)
    assert kinds == [True] * refused + [False] * (5 - refused)


def opens_direct(folder: Path) -> bool:
    try:
        os.close(os.open(folder / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        return False
    return True


def test_write_image_slow_block_makes_rest_prompt(
    tmp_path: Path, fd: int, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of which one block takes long waits for no idle core any more."""
    pwrite = os.pwrite

    def slow_second(fd: int, data: memoryview, offset: int) -> int:
        clock.sleep(1.5 if offset == direct_io.BLOCK_BYTES else 0.1)
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", slow_second)
    threads = Noted()
    write(tmp_path / "f", fd, threads, 4, is_urgent=lambda: False)
    assert threads.urgent == [False, False, True, True]


@pytest.mark.parametrize(
    ("mode", "waits", "policy"),
    [
        (AsyncCheckpointMode.async_, False, os.SCHED_IDLE),
        (AsyncCheckpointMode.async_pinned, False, os.SCHED_IDLE),
        (AsyncCheckpointMode.disabled, True, os.SCHED_OTHER),
    ],
)
def test_writer_loop_waits_hurries(
    tmp_path: Path, mode: AsyncCheckpointMode, waits: bool, policy: int
) -> None:
    checkpointer = AsyncCheckpointer(mode)
    checkpointer.begin_save({"w": torch.ones(1000)}, tmp_path / "c")
    if not waits:
        wait_until(lambda: not checkpointer.is_pending, "a save that nobody waits for")
    checkpointer.wait()
    threads = [int(task.name) for task in Path(f"/proc/{checkpointer.writer_pid}/task").iterdir()]
    workers = {os.sched_getscheduler(thread) for thread in threads if thread != checkpointer.writer_pid}
    assert workers == {policy}
    checkpointer.close()


def test_writer_wait_for_pending_save_hurries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared: list[SharedProgress] = []

    def noted(fd: int) -> SharedProgress:
        shared.append(SharedProgress(fd))
        return shared[-1]

    monkeypatch.setattr(writer_client, "SharedProgress", noted)
    checkpointer = AsyncCheckpointer(AsyncCheckpointMode.async_)
    checkpointer.save({"w": torch.ones(1000)}, tmp_path / "c")
    wait_until(lambda: shared, "a writer")
    (progress,) = shared
    assert not progress.urgent
    checkpointer.wait()
    assert progress.urgent
    checkpointer.save({"w": torch.ones(1000)}, tmp_path / "d")
    assert not progress.urgent
    checkpointer.close()
    assert len(shared) == 1


def test_writer_names_lost_save_whose_last_file_was_a_link(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first rank's frozen tensors are in a file after its first one, and are linked last."""
    source, number = tmp_path / "source", os.memfd_create("progress")
    source.write_bytes(b"1")
    os.ftruncate(number, PROGRESS_BYTES)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        for name in ("shard_00000_of_00002.safetensors", "shard_00001_of_00002.safetensors"):
            body = {"do": "link", "path": str(tmp_path / name), "source": str(source), "size_bytes": 1}
            ours.send(json.dumps({**body, "identity": None}).encode())
        ours.shutdown(socket.SHUT_WR)  # as if the trainer was killed
        serve(theirs, SharedProgress(number))
    os.close(number)
    assert f"kempnerforge: {tmp_path} is not committed" in capfd.readouterr().err
