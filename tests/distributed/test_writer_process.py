"""What the writer takes from the training's steps: huge pages, and time that nobody else wants."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kempnerforge.checkpoint import image_writer, shared_memory
from kempnerforge.checkpoint.async_save import AsyncCheckpointer
from kempnerforge.checkpoint.image_writer import write_image
from kempnerforge.checkpoint.lanes import Lanes
from kempnerforge.checkpoint.shared_memory import HUGE_BYTES, map_filled, map_new
from kempnerforge.config.schema import AsyncCheckpointMode

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


def test_trainer_and_writer_see_one_memory_of_huge_pages(fd: int) -> None:
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


def test_where_huge_pages_are_refused_small_ones_do(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "_MADV_COLLAPSE", 12345)  # EINVAL, as before Linux 6.1
    filled = map_new(fd, SIZE_BYTES)
    filled[-1] = 9
    assert map_filled(fd, SIZE_BYTES)[-1] == 9
    assert smaps_of(filled)["Rss"] > 0


def test_memory_stays_while_a_tensor_of_it_lives_and_no_longer(fd: int) -> None:
    tensor = torch.frombuffer(map_new(fd, SIZE_BYTES), dtype=torch.uint8)
    address = tensor.data_ptr()
    assert smaps_at(address)["Size"] >= 3 * HUGE_BYTES
    tensor.fill_(3)
    part = tensor[-1:]
    del tensor
    assert int(part) == 3
    del part
    assert smaps_at(address) == {}


def test_memory_that_cannot_be_mapped_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(4096))
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    before = Path("/proc/self/maps").read_text().count("\n")
    with pytest.raises(OSError, match="mmap"):
        map_new(fd, 4096)
    os.close(fd)
    assert Path("/proc/self/maps").read_text().count("\n") <= before + 1


def write(path: Path, fd: int, lanes: Lanes, blocks: int, **options: object) -> None:
    size_bytes = (blocks - 1) * image_writer.BLOCK_BYTES + 5
    os.ftruncate(fd, image_writer.padded(size_bytes))
    write_image(map_new(fd, image_writer.padded(size_bytes)), path, size_bytes, lanes, **options)  # type: ignore[arg-type]
    assert path.stat().st_size == size_bytes


class Noted(Lanes):
    def __init__(self) -> None:
        super().__init__()
        self.prompt: list[bool] = []

    def pick(self, *, prompt: bool) -> Executor:
        self.prompt.append(prompt)
        return super().pick(prompt=prompt)


def test_a_lane_has_the_priority_that_it_says() -> None:
    lanes = Lanes()
    policies = [lanes.pick(prompt=one).submit(os.sched_getscheduler, 0).result() for one in (True, False)]
    assert policies == [os.SCHED_OTHER, os.SCHED_IDLE]
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_it_is_asked_before_each_block_whether_somebody_waits(
    tmp_path: Path, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_writer, "_SLOW_BLOCK_S", math.inf)
    lanes, answers = Noted(), iter([False, True, False])
    write(tmp_path / "f", fd, lanes, 3, prompt=lambda: next(answers))
    assert lanes.prompt == [False, True, False]


def test_a_file_whose_block_takes_long_waits_for_no_idle_core(
    tmp_path: Path, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, write_at = [0.0], image_writer._write_at

    def slow_second(fd: int, data: memoryview, offset: int, beat: Callable[[], None]) -> None:
        clock[0] += 1.5 if offset == image_writer.BLOCK_BYTES else 0.1
        write_at(fd, data, offset, beat)

    monkeypatch.setattr(image_writer, "_write_at", slow_second)
    monkeypatch.setattr(image_writer, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    lanes = Noted()
    write(tmp_path / "f", fd, lanes, 4, prompt=lambda: False)
    assert lanes.prompt == [False, False, True, True]


@pytest.mark.parametrize(
    ("mode", "waits", "policy"),
    [
        (AsyncCheckpointMode.async_, False, os.SCHED_IDLE),
        (AsyncCheckpointMode.async_pinned, False, os.SCHED_IDLE),
        (AsyncCheckpointMode.disabled, True, os.SCHED_OTHER),
    ],
)
def test_the_writer_hurries_when_the_loop_waits(
    tmp_path: Path, mode: AsyncCheckpointMode, waits: bool, policy: int
) -> None:
    checkpointer = AsyncCheckpointer(mode)
    checkpointer.begin_save({"w": torch.ones(1000)}, tmp_path / "c")
    while not waits and checkpointer.is_pending:
        time.sleep(0.01)
    checkpointer.wait()
    threads = [int(task.name) for task in Path(f"/proc/{checkpointer.writer_pid}/task").iterdir()]
    workers = {os.sched_getscheduler(thread) for thread in threads if thread != checkpointer.writer_pid}
    assert workers == {policy}
    checkpointer.close()


def test_to_wait_for_a_save_under_way_hurries_the_writer(tmp_path: Path) -> None:
    checkpointer = AsyncCheckpointer(AsyncCheckpointMode.async_)
    checkpointer.save({"w": torch.ones(1000)}, tmp_path / "c")
    pulse = checkpointer._writer._pulse
    while pulse is None:
        time.sleep(0.001)
        pulse = checkpointer._writer._pulse
    assert not pulse.prompt
    checkpointer.wait()
    assert pulse.prompt
    checkpointer.save({"w": torch.ones(1000)}, tmp_path / "d")
    assert not pulse.prompt
    checkpointer.close()
