"""What becomes of a save when a ``with`` is left, by its end or by an exception, and where saves may go."""

from __future__ import annotations

import errno
import gc
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from kempnerforge import (
    AsyncCheckpointer,
    AsyncCheckpointMode,
    CheckpointConfig,
    CheckpointManager,
    SafetensorsReader,
    SafetensorsWriter,
    TrainState,
)
from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.load.dcp_reader import load_tensors
from kempnerforge.checkpoint.save.pipeline import RetryPolicy
from kempnerforge.checkpoint.save.staging import BlockingCopy
from kempnerforge.checkpoint.save.writer_client import Writer
from kempnerforge.checkpoint.save_coordinator import SaveCoordinator
from kempnerforge.checkpoint.tools.verify import verify
from kempnerforge.errors import SaveFailedError

pytestmark = [pytest.mark.smoke, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

STATE = {"w": torch.arange(1000.0)}
ONCE = RetryPolicy(write_tries=1, first_pause_s=0.0)
MODES = [mode.value for mode in AsyncCheckpointMode]


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write of a shard fails."""

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Writer, "write", fail)


def loaded(path: Path) -> torch.Tensor:
    target = {"w": torch.zeros(1000)}
    load_tensors(target, SafetensorsReader(path))
    return target["w"]


@pytest.mark.parametrize("mode", MODES)
def test_checkpointer_with_left_save_is_committed(tmp_path: Path, mode: str) -> None:
    with AsyncCheckpointer(mode) as checkpointer:
        assert checkpointer.mode.value == mode
        checkpointer.save(STATE, tmp_path / "c")
    assert torch.equal(loaded(tmp_path / "c"), STATE["w"])
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert checkpointer.writer_pid is None


def test_checkpointer_exception_leaves_with_save_committed(tmp_path: Path) -> None:
    with pytest.raises(KeyError), AsyncCheckpointer("async") as checkpointer:  # noqa: PT012
        checkpointer.save(STATE, tmp_path / "c")
        raise KeyError
    assert torch.equal(loaded(tmp_path / "c"), STATE["w"])


@pytest.mark.usefixtures("full_disk")
def test_checkpointer_failed_save_raised_where_with_ends(tmp_path: Path) -> None:
    checkpointer = AsyncCheckpointer("async", patience=ONCE)
    with pytest.raises(SaveFailedError, match=r"c was not saved: rank 0: .*No space left"), checkpointer:
        checkpointer.save(STATE, tmp_path / "c")
    assert list(tmp_path.iterdir()) == []
    assert checkpointer.writer_pid is None


@pytest.mark.usefixtures("full_disk")
def test_checkpointer_failed_save_and_exception_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = AsyncCheckpointer("async", patience=ONCE)
    with pytest.raises(KeyError), checkpointer:  # noqa: PT012
        checkpointer.save(STATE, tmp_path / "c")
        raise KeyError
    said = caplog.text
    assert said.count("was not saved") == 1
    assert f"kempnerforge: {tmp_path / 'c'} was not saved: rank 0: " in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("full_disk")
def test_checkpointer_failure_told_by_wait_is_not_said_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = AsyncCheckpointer("async", patience=ONCE)
    checkpointer.save(STATE, tmp_path / "c")
    with pytest.raises(SaveFailedError):
        checkpointer.wait()
    checkpointer.close()
    assert caplog.text == ""


def test_checkpointer_dropped_without_close_frees_buffers(tmp_path: Path) -> None:
    def buffers() -> int:
        gc.collect()
        return Path("/proc/self/maps").read_text().count("memfd:")

    before = buffers()
    checkpointer = AsyncCheckpointer("async")
    checkpointer.save(STATE, tmp_path / "c")
    assert buffers() > before
    checkpointer.join()
    del checkpointer
    assert buffers() == before


def test_prepare_waits_for_the_buffers_of_a_save(tmp_path: Path) -> None:
    with AsyncCheckpointer("async") as checkpointer:
        checkpointer.begin_save(STATE, tmp_path / "c", before_commit=lambda: time.sleep(0.5))
        checkpointer.prepare({"other": torch.zeros(2000)})
        assert torch.equal(loaded(tmp_path / "c"), STATE["w"])


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_checkpointer_interrupt_in_copy_is_raised(
    tmp_path: Path, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupt(_self: BlockingCopy) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockingCopy, "start", interrupt)
        with pytest.raises(KeyboardInterrupt), AsyncCheckpointer(mode, patience=ONCE) as checkpointer:
            checkpointer.save(STATE, tmp_path / "c")
    assert f"{tmp_path / 'c'} was not saved: rank 0: " in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("interrupted", ["copy", "plan", "wait"])
def test_manager_goes_on_after_a_caught_interrupt(tmp_path: Path, interrupted: str) -> None:
    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    targets: dict[str, tuple[type[Any], str]] = {
        "copy": (BlockingCopy, "start"),
        "plan": (AsyncCheckpointer, "_plan_save"),
        "wait": (SaveCoordinator, "_end"),
    }
    owner, name = targets[interrupted]
    manager, state = training(tmp_path, save_last=True, async_mode="disabled")
    with manager as ckpt:
        ckpt.resume(state)
        state.advance()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                ckpt.after_step(state)
        ckpt.finish(state)
    assert paths.committed_steps(tmp_path / "checkpoints") == [1]


def test_blocking_copy_interrupted_raises_and_reports() -> None:
    class Interrupted(torch.Tensor):
        """A source whose copy Ctrl-C ends."""

        @classmethod
        def __torch_function__(cls, *_: Any, **__: Any) -> Any:
            raise KeyboardInterrupt

    copy = BlockingCopy([(torch.zeros(2), torch.ones(2).as_subclass(Interrupted))])
    with pytest.raises(KeyboardInterrupt):
        copy.start()
    with pytest.raises(KeyboardInterrupt):
        copy.finish()


@pytest.mark.parametrize("mode", ["nonsense", "", None, 1, "async_pinned"])
def test_checkpointer_unknown_mode_is_refused(mode: Any) -> None:
    with pytest.raises(ValueError, match='is not one of "disabled", "async", "async_with_pinned_mem"'):
        AsyncCheckpointer(mode)


def training(folder: Path, **config: Any) -> tuple[CheckpointManager, TrainState]:
    model = torch.nn.Linear(4, 2)
    state = TrainState(model=model, optimizer=torch.optim.AdamW(model.parameters()))
    settings = CheckpointConfig.model_validate({"interval": 1, "async_mode": "async", **config})
    return CheckpointManager(settings, state=state, run_dir=folder), state


def test_manager_resume_counts_the_pending_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager, state = training(tmp_path)
    with manager as ckpt:
        ckpt.resume(state)
        monkeypatch.setattr(ckpt, "_check_lease", lambda: time.sleep(0.3))
        state.advance()
        ckpt.after_step(state)
        assert ckpt.resume(state).step == 1
        state.advance()
        ckpt.after_step(state)
    assert paths.committed_steps(tmp_path / "checkpoints") == [2, 1]


def test_manager_exception_leaves_with_step_committed(tmp_path: Path) -> None:
    manager, state = training(tmp_path)
    with pytest.raises(KeyError), manager as ckpt:  # noqa: PT012
        ckpt.resume(state)
        state.advance()
        ckpt.after_step(state)
        raise KeyError
    assert paths.committed_steps(tmp_path / "checkpoints") == [1]


def test_manager_with_left_pending_failure_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager, state = training(tmp_path)

    def fail(*_: Any, **__: Any) -> Any:
        raise SaveFailedError("no disk")

    monkeypatch.setattr(Writer, "write", fail)
    with pytest.raises(SaveFailedError, match="no disk"), manager as ckpt:  # noqa: PT012
        ckpt.resume(state)
        state.advance()
        ckpt.after_step(state)
    assert paths.committed_steps(tmp_path / "checkpoints") == []


URL = "s3://bucket/run/c"


def test_checkpoint_url_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with AsyncCheckpointer() as checkpointer, pytest.raises(ValueError, match="give a path, not a URL"):
        checkpointer.save(STATE, URL)
    for plug_in in (SafetensorsWriter, SafetensorsReader):
        with pytest.raises(ValueError, match=f"{URL}: .*not a URL"):
            plug_in(URL)
    assert list(tmp_path.iterdir()) == []


def test_writer_leftovers_of_killed_save_are_replaced(tmp_path: Path) -> None:
    left = tmp_path / paths.temporary_name("c", 0)
    left.mkdir()
    (left / "shard_00000_of_00001.safetensors").write_bytes(b"half")
    save(dict(STATE), storage_writer=SafetensorsWriter(tmp_path / "c"))
    assert torch.equal(loaded(tmp_path / "c"), STATE["w"])
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_reader_reset_to_another_checkpoint_reads_that(tmp_path: Path) -> None:
    for number in (1, 2):
        save({"w": STATE["w"] * number}, storage_writer=SafetensorsWriter(tmp_path / f"c{number}"))
    reader, target = SafetensorsReader(tmp_path / "c1"), {"w": torch.zeros(1000)}
    for number in (1, 2, 1):
        load(target, checkpoint_id=tmp_path / f"c{number}", storage_reader=reader)
        assert torch.equal(target["w"], STATE["w"] * number)


def test_state_dict_named_like_a_step_verifies(tmp_path: Path) -> None:
    with AsyncCheckpointer() as checkpointer:
        checkpointer.save(STATE, tmp_path / "step_00000001")
    assert verify(tmp_path / "step_00000001").sound


def test_save_and_load_work_under_any_default_device(tmp_path: Path) -> None:
    manager, state = training(tmp_path)
    with torch.device("meta"), manager as ckpt:
        ckpt.resume(state)
        state.advance()
        ckpt.finish(state)
    want = {name: tensor.clone() for name, tensor in state.tensors().items()}
    manager, state = training(tmp_path)
    with torch.device("meta"), manager as ckpt:
        assert ckpt.resume(state).step == 1
    assert all(torch.equal(tensor, want[name]) for name, tensor in state.tensors().items())
    with torch.device("meta"):
        save(dict(STATE), storage_writer=SafetensorsWriter(tmp_path / "c"))
        target = {"w": torch.zeros(1000, device="cpu")}
        load(target, storage_reader=SafetensorsReader(tmp_path / "c"))
    assert torch.equal(target["w"], STATE["w"])
