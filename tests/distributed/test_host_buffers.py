"""Host buffers: pinned where that works, refused together, and left alone until nothing copies into them."""

from __future__ import annotations

import errno
import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from torch._subclasses.fake_tensor import FakeTensorMode

from kempnerforge import AsyncCheckpointer, SafetensorsReader
from kempnerforge.checkpoint import cuda
from kempnerforge.checkpoint.load.dcp_reader import load_tensors
from kempnerforge.checkpoint.save import shared_memory
from kempnerforge.checkpoint.save.pipeline import RetryPolicy
from kempnerforge.checkpoint.save.staging import BlockingCopy
from kempnerforge.checkpoint.save.writer_client import Writer
from kempnerforge.errors import SaveFailedError

pytestmark = [pytest.mark.smoke, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

ONCE = RetryPolicy(write_tries=1, first_pause_s=0.0)


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def save_where_pinning_fails(folder: str, failing: int) -> list[str]:
    """Save as if on CUDA, which cannot run here: registering memory fails on one rank."""
    rank, handler = dist.get_rank(), Lines()
    logging.getLogger("kempnerforge.checkpoint.async_save").addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "device_of", lambda _tensors: torch.device("cuda", 0))
        patch.setattr(cuda, "use", lambda _device: None)
        patch.setattr(cuda, "pin", lambda *_: "no more of it" if rank == failing else "")
        patch.setattr(cuda, "unpin", lambda *_: None)
        with AsyncCheckpointer("async") as checkpointer:
            for number in range(2):
                state = {"w": torch.full((5,), float(number)), f"own{rank}": torch.ones(9)}
                checkpointer.save(state, f"{folder}/c{number}")
                checkpointer.wait()
    return handler.lines


@pytest.mark.parametrize("failing", [0, 1])
def test_save_not_pinned_on_one_rank_warns_once(failing: int, tmp_path: Path) -> None:
    said, silent = run_ranks(save_where_pinning_fails, 2, str(tmp_path), failing)
    assert silent == []
    assert len(said) == 1
    assert "not pinned on 1 of 2 ranks" in said[0]
    assert said[0].endswith(f"Rank {failing}: no more of it")
    target = {"w": torch.zeros(5)}
    load_tensors(target, SafetensorsReader(tmp_path / "c1"))
    assert target["w"].tolist() == [1.0] * 5


def save_on_two_devices(folder: str) -> str:
    state: dict[str, torch.Tensor] = {"w": torch.ones(2)}
    if dist.get_rank() == 1:
        with FakeTensorMode():
            state |= {f"part{number}": torch.empty(2, device=f"cuda:{number}") for number in range(2)}
    with AsyncCheckpointer("async") as checkpointer, pytest.raises(ValueError, match="cuda:1") as caught:
        checkpointer.save(state, f"{folder}/c")
    return str(caught.value)


def test_save_several_cuda_devices_in_a_process_are_named(tmp_path: Path) -> None:
    """On all ranks, and before anything is written."""
    first, second = run_ranks(save_on_two_devices, 2, str(tmp_path))
    assert first == second
    assert first.startswith("rank 1: part0 is on cuda:0, part1 is on cuda:1: ")
    assert list(tmp_path.iterdir()) == []


def test_save_without_pages_fails_and_takes_nothing(tmp_path: Path) -> None:
    def no_pages(*_: Any) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with AsyncCheckpointer("async") as checkpointer:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shared_memory.os, "posix_fallocate", no_pages)
            with pytest.raises(SaveFailedError, match="cannot make its host buffers: OSError"):
                checkpointer.save({"w": torch.ones(5)}, tmp_path / "c")
        assert checkpointer.host_bytes == 0
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ended_by", ["wait", "close"])
def test_failed_save_ends_after_its_copy(ended_by: str, tmp_path: Path) -> None:
    """Else the copy would write into buffers that belong to the next save, or to nobody."""
    events = []
    copy = BlockingCopy._copy

    def slow_copy(staging: BlockingCopy) -> None:
        time.sleep(1.0)
        copy(staging)
        events.append("copied")

    def fail(*_: Any, **__: Any) -> Any:
        events.append("write failed")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockingCopy, "_copy", slow_copy)
        patch.setattr(Writer, "write", fail)
        checkpointer = AsyncCheckpointer("async_with_pinned_mem", patience=ONCE)
        checkpointer.begin_save({"w": torch.ones(5)}, tmp_path / "c")
        if ended_by == "wait":
            with pytest.raises(SaveFailedError):
                checkpointer.wait()
        else:
            checkpointer.close()
        events.append("ended")
        checkpointer.close()
    assert events == ["write failed", "copied", "ended"]
