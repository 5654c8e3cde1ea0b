"""What ``begin_save`` returns: the handle of one save, and the request that it is begun with."""

from __future__ import annotations

import errno
import gc
import os
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
    TrainState,
)
from kempnerforge.checkpoint.format import manifest, paths
from kempnerforge.checkpoint.format.manifest import Provenance
from kempnerforge.checkpoint.save.pipeline import RetryPolicy, SaveRequest
from kempnerforge.checkpoint.save.writer_client import Writer
from kempnerforge.errors import SaveFailedError

pytestmark = pytest.mark.smoke

STATE = {"w": torch.arange(1000.0)}
MODES = [mode.value for mode in AsyncCheckpointMode]


@pytest.mark.parametrize("mode", MODES)
def test_save_handle_is_done_after_the_commit(tmp_path: Path, mode: str) -> None:
    may_commit = threading.Event()
    with AsyncCheckpointer(mode) as checkpointer:
        handle = checkpointer.begin_save(STATE, tmp_path / "c", before_commit=may_commit.wait)
        handle.wait_until_staged()
        assert not handle.done()
        assert checkpointer.is_pending
        assert not (tmp_path / "c").exists()
        may_commit.set()
        assert handle.result().size_bytes > 4000
        assert handle.done()
        assert not checkpointer.is_pending
        assert (tmp_path / "c" / paths.MANIFEST).exists()
        assert checkpointer.wait() is None, "the outcome has been read"
        checkpointer.save(STATE, tmp_path / "d")
        assert handle.result() == handle.result(), "also after the next save"


def test_save_handle_failure_is_raised_by_result_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with AsyncCheckpointer("async", patience=RetryPolicy(write_tries=1)) as checkpointer:
        with monkeypatch.context() as patch:
            patch.setattr(Writer, "write", fail)
            handle = checkpointer.begin_save(STATE, tmp_path / "c")
            for _ in range(2):
                with pytest.raises(SaveFailedError, match=r"c was not saved: rank 0: .*No space left"):
                    handle.result()
        assert checkpointer.begin_save(STATE, tmp_path / "d").result().error == ""
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    assert caplog.text == ""


def test_save_handle_keeps_no_buffers_after_its_result(tmp_path: Path) -> None:
    def buffers() -> int:
        gc.collect()
        return Path("/proc/self/maps").read_text().count("memfd:kempnerforge-shard")

    before = buffers()
    with AsyncCheckpointer("async") as checkpointer:
        handle = checkpointer.begin_save(STATE, tmp_path / "c")
        assert buffers() > before
        handle.result()
    assert buffers() == before
    assert handle.done()


def test_save_request_and_its_fields_reach_the_manifest(tmp_path: Path) -> None:
    request = SaveRequest(provenance=Provenance(run_id="r", attempt=2), config_toml="a = 1\n")
    with AsyncCheckpointer() as checkpointer:
        checkpointer.begin_save(STATE, tmp_path / "c", request=request).result()
        checkpointer.begin_save(STATE, tmp_path / "d", request=request, config_toml="a = 2\n").result()
        with pytest.raises(TypeError, match="before_commits"):
            checkpointer.begin_save(STATE, tmp_path / "e", before_commits=lambda: None)
    for name, config_toml in (("c", "a = 1\n"), ("d", "a = 2\n")):
        assert manifest.read(tmp_path / name).provenance.run_id == "r"
        assert (tmp_path / name / paths.CONFIG).read_text() == config_toml
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "d"]


@pytest.mark.parametrize(
    ("name", "former"),
    [
        ("collect_votes", "vote"),
        ("apply_votes", "decide"),
        ("status_message", "news"),
        ("exclude_time", "leave_out"),
    ],
)
def test_manager_former_method_names_still_work(name: str, former: str) -> None:
    assert getattr(CheckpointManager, former) is getattr(CheckpointManager, name)


def test_save_handle_of_closed_checkpointer_has_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Writer, "write", fail)
    checkpointer = AsyncCheckpointer("async", patience=RetryPolicy(write_tries=1))
    handle = checkpointer.begin_save(STATE, tmp_path / "c")
    checkpointer.close()
    assert "c was not saved: rank 0" in caplog.text
    with pytest.raises(SaveFailedError, match="c was not saved"):
        handle.result()
    with monkeypatch.context() as patch:
        patch.setattr(type(handle), "peek", lambda _: None)  # as where the first rank posted nothing
        with pytest.raises(SaveFailedError, match="closed before the outcome was known"):
            handle.result()


def test_save_without_provenance_has_the_default(tmp_path: Path) -> None:
    with AsyncCheckpointer("disabled") as checkpointer:
        checkpointer.save(STATE, tmp_path / "c", provenance=None)
    assert manifest.load(tmp_path / "c").provenance.attempt == Provenance().attempt


def test_save_former_reason_is_stored_under_its_new_name(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    state = TrainState(model=model, optimizer=torch.optim.SGD(model.parameters()))
    config = CheckpointConfig(async_mode=AsyncCheckpointMode.disabled)
    with CheckpointManager(config, state=state, run_dir=tmp_path) as ckpt:
        ckpt.resume(state)
        state.advance()
        report = ckpt.save(state, wait=True, reason="asked")
        (committed,) = ckpt.poll() or [report]
    assert manifest.load(tmp_path / "checkpoints/step_00000001").provenance.reason == "requested"
    row = committed.row()
    assert row["checkpoint/tax_s"] == row["checkpoint/overhead_s"] == committed.tax_s
    assert row["checkpoint/tax_is_lower_bound"] is committed.tax_is_lower_bound
