"""Readers that retention leaves alone, and those that it need not wait for."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.step_maker import write_step

from kempnerforge.checkpoint.retention import read_locks
from kempnerforge.errors import StepNotFoundError


@pytest.fixture
def step(tmp_path: Path) -> Path:
    return write_step(tmp_path / "checkpoints", 7)


def files(step: Path) -> list[Path]:
    """Of the read locks."""
    return sorted((step.parent / "holds").glob("*"))


def test_read_lock_released_leaves_no_file(step: Path) -> None:
    with read_locks.lock_for_reading(step, what="verify"), read_locks.lock_for_reading(step, what="export"):
        assert len(files(step)) == 2
        assert {name.partition(" ")[0] for name in read_locks.readers(step.parent)[7]} == {"verify", "export"}
    assert os.listdir(step.parent) == ["step_00000007"]


def test_read_lock_error_in_block_releases_it(step: Path) -> None:
    with pytest.raises(ZeroDivisionError), read_locks.lock_for_reading(step, what="verify"):
        raise ZeroDivisionError
    assert os.listdir(step.parent) == ["step_00000007"]


def test_read_lock_folder_refused_is_no_lock(step: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr(read_locks.fsio, "new_folder", refuse)
    with read_locks.lock_for_reading(step, what="fork") as locked:
        assert not locked


def test_read_lock_not_removable_fails_no_reader(step: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with read_locks.lock_for_reading(step, what="fork") as locked:
        assert locked
        monkeypatch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(OSError("EIO")))
    monkeypatch.undo()
    assert len(files(step)) == 1


def test_read_lock_of_link_locks_target(step: Path) -> None:
    (step.parent / "latest").symlink_to(step.name)
    with read_locks.lock_for_reading(step.parent / "latest", what="diff") as locked:
        assert locked
        assert list(read_locks.readers(step.parent)) == [7]


def test_read_lock_of_missing_step_refused(step: Path) -> None:
    with (
        pytest.raises(StepNotFoundError),
        read_locks.lock_for_reading(step.with_name("step_00000008"), what="verify"),
    ):
        pytest.fail("it was read locked")
    with (
        pytest.raises(StepNotFoundError),
        read_locks.lock_for_reading(step.parent / "no" / "step_00000008", what="verify"),
    ):
        pytest.fail("it was read locked")
    assert os.listdir(step.parent) == ["step_00000007"]


def test_read_lock_folder_never_pruned_gets_no_file(tmp_path: Path) -> None:
    path = write_step(tmp_path, 7).rename(tmp_path / "my_model")
    with read_locks.lock_for_reading(path, what="verify") as locked:
        assert not locked
        assert os.listdir(tmp_path) == ["my_model"]


def test_read_lock_unwritable_folder_continues_without(step: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(read_locks.fsio, "write_new_file", refuse)
    with read_locks.lock_for_reading(step, what="verify") as locked:
        assert not locked


def test_read_lock_renewed_and_recreated_when_removed(step: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_locks, "RENEW_EVERY_S", 0.02)
    with read_locks.lock_for_reading(step, what="verify"):
        (path,) = files(step)
        os.utime(path, (1, 1))
        wait_until(lambda: path.stat().st_mtime > 1, "the read lock was not renewed")
        path.unlink()
        wait_until(path.exists, "the read lock did not come back")
        assert read_locks.readers(step.parent) == {7: ["a reader"]}
    assert os.listdir(step.parent) == ["step_00000007"]


def wait_until(true: Callable[[], bool], message: str) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, message
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("age_s", "locked"), [(0, True), (590, True), (610, False), (1e6, False), (-60, True)]
)
def test_read_lock_not_renewed_becomes_stale(
    step: Path, monkeypatch: pytest.MonkeyPatch, age_s: float, locked: bool
) -> None:
    monkeypatch.setattr(read_locks, "RENEW_EVERY_S", 3600.0)
    with read_locks.lock_for_reading(step, what="verify"):
        (path,) = files(step)
        now = path.stat().st_mtime + age_s
        assert (7 in read_locks.readers(step.parent, now=now)) == locked
        read_locks.remove_stale(step.parent, now=now)
        assert bool(files(step)) == locked


def test_read_lock_of_other_host_stale_by_age_only(step: Path) -> None:
    with read_locks.lock_for_reading(step, what="verify"):
        (path,) = files(step)
        body = json.loads(path.read_text())
        body["reader"] |= {"host": "elsewhere", "boot_id": "another", "pid": 2**22 + 1}
        path.write_text(json.dumps(body))
        assert read_locks.readers(step.parent) == {7: [f"verify (pid {2**22 + 1} on elsewhere)"]}


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"what": "x", "reader": {}}', "[" * 100_000])
def test_read_lock_unparsable_is_being_written(step: Path, content: str) -> None:
    (step.parent / "holds").mkdir()
    (step.parent / "holds" / "step_00000007.0123456789abcdef.json").write_text(content)
    (step.parent / "holds" / "step_7.0123.json").write_text(content)
    (step.parent / "holds" / "README").write_text(content)
    assert read_locks.readers(step.parent) == {7: ["a reader"]}
    read_locks.remove_stale(step.parent, now=time.time() + 2 * read_locks.LIFETIME_S)
    assert [path.name for path in files(step)] == ["README", "step_7.0123.json"]
