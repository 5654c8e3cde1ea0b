"""The read lock of a reader that was killed keeps nothing."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
from support.step_maker import write_step

from kempnerforge.checkpoint.retention import read_locks

pytestmark = pytest.mark.smoke


@pytest.fixture
def step(tmp_path: Path) -> Path:
    return write_step(tmp_path / "checkpoints", 7)


def files(step: Path) -> list[Path]:
    return sorted((step.parent / "holds").glob("*"))


def lock_for_ever(step: Path, locked: Event) -> None:
    with read_locks.lock_for_reading(step, what="verify"):
        locked.set()
        time.sleep(600)


def test_read_lock_reader_killed_keeps_nothing(step: Path) -> None:
    context = multiprocessing.get_context("fork")
    locked = context.Event()
    process = context.Process(target=lock_for_ever, args=(step, locked))
    process.start()
    assert locked.wait(60), "the reader does not begin"
    assert list(read_locks.readers(step.parent)) == [7]
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    assert list(read_locks.readers(step.parent)) == [7], "stopped is not ended"
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(files(step)) == 1
    assert read_locks.readers(step.parent) == {}
    read_locks.remove_stale(step.parent)
    assert files(step) == []
