"""Saves of tensors on a CUDA device: pinned buffers, whole snapshots, nothing left running. One GPU."""

from __future__ import annotations

import errno
import gc
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from kempnerforge import (
    AsyncCheckpointer,
    AsyncCheckpointMode,
    CheckpointConfig,
    CheckpointManager,
    SafetensorsReader,
    TrainState,
)
from kempnerforge.checkpoint import cuda
from kempnerforge.checkpoint.load.dcp_reader import load_tensors
from kempnerforge.checkpoint.save.pipeline import RetryPolicy
from kempnerforge.checkpoint.save.staging import StreamCopy
from kempnerforge.checkpoint.save.writer_client import Writer
from kempnerforge.errors import SaveFailedError

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]

MODES = [mode.value for mode in AsyncCheckpointMode]
ONCE = RetryPolicy(write_tries=1, first_pause_s=0.0)
A_SECOND = 2_000_000_000
"""In cycles of the device, about."""


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def make_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Tensors of several kinds, 9 MB: more than one block, strided, of bf16, 0-dim, and one on the host."""
    generator = torch.Generator(device).manual_seed(3)
    w = torch.randn(1500, 1500, device=device, generator=generator)
    return {
        "w": w,
        "transposed": w[:40, :30].t(),
        "half": w[0].to(torch.bfloat16),
        "step": torch.tensor(7.0, device=device),
        "host": torch.arange(10),
    }


def loaded(path: Path, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What was saved, loaded to where ``like`` is."""
    target = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
    load_tensors(target, SafetensorsReader(path))
    return target


def buffers(checkpointer: AsyncCheckpointer) -> list[torch.Tensor]:
    buffers = checkpointer._plan.buffers
    assert buffers is not None
    return [buffer._bytes for buffer in buffers.buffers]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("mode", MODES)
def test_cuda_save_stages_through_pinned_memory(mode: str, device: torch.device, tmp_path: Path) -> None:
    state = make_state(device)
    with AsyncCheckpointer(mode) as checkpointer:
        for number in range(3):
            state["w"].add_(1)
            checkpointer.save(state, tmp_path / f"c{number}")
            checkpointer.wait()
            assert same(loaded(tmp_path / f"c{number}", state), state)
        kept = buffers(checkpointer)
        assert all(buffer.is_pinned() for buffer in kept)
    assert not any(buffer.is_pinned() for buffer in kept)


@pytest.mark.parametrize("mode", MODES)
def test_cuda_save_is_of_one_step(mode: str, device: torch.device, tmp_path: Path) -> None:
    """Kernels that are queued before a save belong to it, those queued behind it do not."""
    state = make_state(device)
    with AsyncCheckpointer(mode) as checkpointer:
        for number in range(3):
            torch.cuda._sleep(A_SECOND // 4)
            state["w"].add_(1)
            checkpointer.begin_save(state, tmp_path / f"c{number}")
            checkpointer.wait_for_staging()
            torch.cuda._sleep(A_SECOND // 20)
            state["w"].mul_(3)
            checkpointer.wait()
            found = loaded(tmp_path / f"c{number}", state)
            assert torch.equal(found["w"] * 3, state["w"])


def test_cuda_save_thread_sets_its_device_first(device: torch.device, tmp_path: Path) -> None:
    calls: list[tuple[str, str]] = []
    set_device, query = torch.cuda.set_device, torch.cuda.Event.query

    def note(what: str) -> None:
        calls.append((threading.current_thread().name, what))

    def noted_set_device(wanted: Any) -> None:
        note("set_device")
        set_device(wanted)

    def noted_query(event: torch.cuda.Event) -> bool:
        note("query")
        return query(event)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "set_device", noted_set_device)
        patch.setattr(torch.cuda.Event, "query", noted_query)
        with AsyncCheckpointer("async_with_pinned_mem") as checkpointer:
            checkpointer.save(make_state(device), tmp_path / "c")
            checkpointer.wait()
    of_thread = [what for name, what in calls if name.startswith("checkpoint-save")]
    assert of_thread[:1] == ["set_device"]
    assert "query" in of_thread


@pytest.mark.parametrize("ended_by", ["wait", "close"])
def test_cuda_failed_save_ends_after_its_copies(ended_by: str, device: torch.device, tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writer, "write", fail)
        checkpointer = AsyncCheckpointer("async_with_pinned_mem", patience=ONCE)
        state = make_state(device)
        checkpointer.prepare(state)
        torch.cuda._sleep(A_SECOND)
        checkpointer.begin_save(state, tmp_path / "c")
        stream = StreamCopy._streams[device]
        assert not stream.query()
        if ended_by == "wait":
            with pytest.raises(SaveFailedError):
                checkpointer.wait()
        else:
            checkpointer.close()
        assert stream.query()
        checkpointer.close()
    assert list(tmp_path.iterdir()) == []


def test_cuda_copy_that_fails_half_way_is_waited_for(device: torch.device) -> None:
    """The part that was queued has no event: waiting for the last event is not enough."""
    good = (torch.empty(1 << 20, pin_memory=True), torch.ones(1 << 20, device=device))
    bad = (torch.empty(3), torch.ones(4, device=device))
    torch.cuda._sleep(A_SECOND // 2)
    copy = StreamCopy([good, bad], device)
    copy.start()
    copy.wait_until_idle()
    assert StreamCopy._streams[device].query()
    assert good[0].sum() == 1 << 20
    with pytest.raises(RuntimeError):
        copy.finish()


def test_cuda_checkpointer_left_open_unpins(device: torch.device, tmp_path: Path) -> None:
    checkpointer = AsyncCheckpointer("async")
    checkpointer.save(make_state(device), tmp_path / "c")
    checkpointer.wait()
    checkpointer._writer.close()  # a process, which no garbage collection ends
    kept = buffers(checkpointer)
    del checkpointer
    gc.collect()
    assert not any(buffer.is_pinned() for buffer in kept)


def test_cuda_pin_failure_leaves_no_error_behind(device: torch.device) -> None:
    """Registering twice really fails; the next kernel's launch check must not raise it."""
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    assert cuda.pin(memory, device) == ""
    try:
        assert "status" in cuda.pin(memory, device)
        assert float(torch.ones(3, device=device).sum()) == 3.0
        assert memory.is_pinned()
    finally:
        cuda.unpin(memory, device)
    assert not memory.is_pinned()


@pytest.mark.parametrize("mode", MODES)
def test_cuda_save_without_pinning_warns_and_is_whole(
    mode: str, device: torch.device, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = make_state(device)
    with pytest.MonkeyPatch.context() as patch, AsyncCheckpointer(mode) as checkpointer:
        patch.setattr(cuda, "pin", lambda *_: "not today")
        with caplog.at_level(logging.WARNING):
            checkpointer.save(state, tmp_path / "c")
            checkpointer.wait()
        assert "not today" in caplog.text
        assert same(loaded(tmp_path / "c", state), state)


def test_cuda_is_left_alone_by_saves_of_host_tensors(tmp_path: Path) -> None:
    code = (
        "import sys, torch\nfrom kempnerforge import AsyncCheckpointer\n"
        "with AsyncCheckpointer('async_with_pinned_mem') as checkpointer:\n"
        "    checkpointer.save({'w': torch.ones(5)}, sys.argv[1])\n"
        "print(torch.cuda.is_initialized())\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "c")], capture_output=True, text=True, check=False
    )
    assert ended.stdout == "False\n", ended.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_cuda_save_of_two_devices_is_refused(tmp_path: Path) -> None:
    state = {f"part{number}": torch.ones(2, device=f"cuda:{number}") for number in range(2)}
    with AsyncCheckpointer("async") as checkpointer, pytest.raises(ValueError, match="part1 is on cuda:1"):
        checkpointer.save(state, tmp_path / "c")


def train_steps(folder: Path, mode: str, device: torch.device, until: int) -> list[float]:
    """Train in a loop as the README has it, with dropout, so that the generators count."""
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Dropout(0.3), torch.nn.Linear(64, 1)).to(
        device
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    state = TrainState(model=model, optimizer=optimizer, device=device)
    config = CheckpointConfig.model_validate({"async_mode": mode, "interval": 2})
    losses = []
    with CheckpointManager(config, state=state, run_dir=folder) as ckpt:
        ckpt.resume(state)
        while state.step < until:
            loss = model(torch.randn(16, 64, device=device)).square().mean()
            loss.backward()
            ckpt.wait_for_staging()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
            state.advance()
            ckpt.after_step(state)
        ckpt.finish(state)
    return losses


@pytest.mark.parametrize("mode", MODES)
def test_cuda_loop_resumes_where_it_was(mode: str, device: torch.device, tmp_path: Path) -> None:
    whole = train_steps(tmp_path / "whole", mode, device, 8)
    parts = train_steps(tmp_path / "parts", mode, device, 4) + train_steps(
        tmp_path / "parts", mode, device, 8
    )
    assert parts == whole


def test_cuda_frozen_tensors_are_linked_and_changes_written(device: torch.device, tmp_path: Path) -> None:
    """Fingerprints are computed on the device. A write through ``.data`` changes them."""
    base, head = torch.nn.Linear(512, 512), torch.nn.Linear(512, 3)
    model = torch.nn.Sequential(base, head).to(device)
    base.requires_grad_(False)
    optimizer = torch.optim.AdamW(head.parameters())
    state = TrainState(model=model, optimizer=optimizer)
    config = CheckpointConfig(interval=1, async_mode=AsyncCheckpointMode.async_pinned, keep_last_n=9)
    linked = []
    with CheckpointManager(config, state=state, run_dir=tmp_path) as ckpt:
        ckpt.resume(state)
        for step in range(1, 5):
            if step == 3:
                base.bias.data[7] += 1
            state.advance()
            ckpt.save(state, wait=True)
            (report,) = ckpt.poll()
            linked.append(report.linked_bytes > 4 * 512 * 512)
            reader = SafetensorsReader(ckpt.folder / f"step_{step:08d}")
            stored = {"model.0.bias": torch.empty(512)}
            load_tensors(stored, reader)
            reader.close()
            assert torch.equal(stored["model.0.bias"], base.bias.cpu())
    assert linked == [False, True, False, True]
