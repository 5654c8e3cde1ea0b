"""Deleting what nothing keeps, beside others who pin, read, save and prune."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.step_maker import flip_byte, resign, write_step

from kempnerforge import fsio
from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.retention import pins, pruner, read_locks
from kempnerforge.checkpoint.retention.disk_space import DiskSpaceGuard
from kempnerforge.checkpoint.retention.policy import KeepPolicy
from kempnerforge.checkpoint.retention.pruner import Pruned, Retention
from kempnerforge.config.schema import CheckpointConfig
from kempnerforge.errors import RunFolderError


def prune(folder: Path, **settings: Any) -> Retention:
    config = CheckpointConfig.model_validate({"keep_last_n": 1} | settings)
    return Retention(folder, KeepPolicy.from_config(config))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Steps 1 to 4, with losses 3, 1, 2, 4."""
    for step, loss in enumerate([3.0, 1.0, 2.0, 4.0], 1):
        write_step(tmp_path / "checkpoints", step, metrics={"eval/loss": loss})
    return tmp_path / "checkpoints"


def test_retention_deletes_only_what_nothing_keeps(folder: Path) -> None:
    found = prune(folder, keep_best_n=1, best_metric="eval/loss", keep_steps=[1])
    before = tree(folder)
    assert [verdict.step for verdict in found.verdicts() if not verdict.keep] == [3]
    assert tree(folder) == before, "looking changes nothing"
    assert found.apply() == Pruned(deleted=(3,))
    assert paths.committed_steps(folder) == [4, 2, 1]
    assert set(os.listdir(folder)) == {"step_00000001", "step_00000002", "step_00000004"}
    assert found.apply() == Pruned()
    assert prune(folder, keep_best_n=1, best_metric="eval/loss", keep_steps=[1]).apply() == Pruned(), (
        "restart"
    )


def test_retention_restart_reads_metrics_from_disk(folder: Path) -> None:
    for step in (5, 6, 7):
        write_step(folder, step, metrics={"eval/loss": 10.0 - step})
        prune(folder, keep_best_n=2, best_metric="eval/loss").apply()
    assert paths.committed_steps(folder) == [7, 3, 2]


FOREIGN = [
    "step_9.bak",
    "step_00000000000",
    "step_5",
    "other",
    ".step_00000008.tmp",
    "step_00000008.1",
    "lost+found",
]


def test_retention_foreign_names_untouched(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(folder / "step_00000004", outside)
    for name in FOREIGN:
        shutil.copytree(outside, folder / name)
    (folder / "step_00000000").symlink_to(outside)
    (folder / "latest").symlink_to("step_00000001")
    (folder / "step_00000009").mkdir()  # a step's name, and nothing of ours in it
    (folder / "step_00000009" / "notes.txt").write_text("mine")
    (folder / ".step_00000006.2.tmp").mkdir()
    (folder / "quarantined.step_00000002.1").mkdir()
    others = set(os.listdir(folder)) - {f"step_0000000{step}" for step in (1, 2, 3, 4)}
    contents = tree(outside)
    assert prune(folder).apply().deleted == (1, 2, 3)
    assert set(os.listdir(folder)) == others | {"step_00000004"}
    for name in [*FOREIGN, "step_00000000"]:
        assert tree(folder / name) == contents


def damaged_by(change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: change(folder / "step_00000004")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no manifest": lambda step: (step / "manifest.json").unlink(),
    "short shard": lambda step: os.truncate(next(step.glob("*.safetensors")), 100),
    "no index": lambda step: (step / "index.bin").unlink(),
    "manifest of another step": lambda step: resign(step, step=3),
    "manifest with a flipped bit": lambda step: flip_byte(step / "manifest.json", 40),
    "another format": lambda step: resign(step, format=2),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_retention_newer_step_damaged_keeps_newest_sound(folder: Path, damage: str) -> None:
    DAMAGE[damage](folder / "step_00000004")
    assert prune(folder).apply().deleted == (1, 2)
    assert set(os.listdir(folder)) == {"step_00000003", "step_00000004"}


@pytest.mark.parametrize("newer", [False, True])
def test_retention_newest_step_damaged_later_noticed(folder: Path, newer: bool) -> None:
    found = prune(folder)
    pins.pin(folder, 3)
    assert found.apply().deleted == (1, 2)
    pins.unpin(folder, 3)
    os.truncate(next((folder / "step_00000004").glob("*.safetensors")), 100)
    if newer:
        os.truncate(next(write_step(folder, 5).glob("*.safetensors")), 100)
    assert found.apply() == Pruned()
    assert 3 in paths.committed_steps(folder)


def test_retention_missing_folder_deletes_nothing(tmp_path: Path) -> None:
    assert prune(tmp_path / "checkpoints").apply() == Pruned()


def test_retention_pinned_step_stays(folder: Path) -> None:
    assert pins.pin(folder, 1, note="for the paper")
    assert not pins.pin(folder, 1)
    assert pins.read(folder)[1].note == "for the paper"
    assert prune(folder).apply().deleted == (2, 3)
    assert pins.unpin(folder, 1)
    assert not pins.unpin(folder, 1)
    assert prune(folder).apply().deleted == (1,)


def test_pin_unwritable_folder_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(pins.fsio, "write_new_file", refuse)
        with pytest.raises(RunFolderError, match=r"step 1 was not pinned: .*pins cannot be written"):
            pins.pin(folder, 1)
    assert pins.read(folder) == {}


def test_pin_is_any_file_with_name_of_step(folder: Path) -> None:
    (folder / "pins").mkdir()
    (folder / "pins" / "step_00000001").touch()
    (folder / "pins" / "step_00000002").write_text("[" * 100_000)
    (folder / "pins" / "3").touch()
    assert prune(folder).apply().deleted == (3,)


def test_retention_read_locked_step_stays(folder: Path) -> None:
    with read_locks.lock_for_reading(folder / "step_00000001", what="verify") as locked:
        assert locked
        ((reader,),) = read_locks.readers(folder).values()
        assert reader.startswith(f"verify (pid {os.getpid()} on ")
        assert prune(folder).apply().deleted == (2, 3)
    assert set(os.listdir(folder)) == {"step_00000001", "step_00000004"}
    assert prune(folder).apply().deleted == (1,)


def test_retention_stale_read_lock_removed(folder: Path) -> None:
    with read_locks.lock_for_reading(folder / "step_00000001", what="verify"):
        (path,) = (folder / "holds").iterdir()
        os.utime(path, (1, 1))
        assert prune(folder).apply().deleted == (1, 2, 3)
        assert list((folder / "holds").iterdir()) == []


# Those who come between the decision and the deletion


def at_the_rename(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object], *, after: bool = False) -> None:
    """Run ``act`` once, just before (or after) retention takes a step's name away."""
    rename, done = os.rename, []

    def spy(source: Path, target: Path) -> None:
        first = not done and str(target).endswith(".deleting")
        if first and not after:
            done.append(act())
        rename(source, target)
        if first and after:
            done.append(act())

    monkeypatch.setattr(pruner.os, "rename", spy)


def test_retention_pin_before_deletion_keeps_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pin that comes between the decision and the deletion counts."""
    before = tree(folder / "step_00000001")
    at_the_rename(monkeypatch, lambda: pins.pin(folder, 1))
    assert prune(folder).apply().deleted == (2, 3)
    assert tree(folder / "step_00000001") == before


def test_pin_after_deletion_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pin() -> None:
        with pytest.raises(pins.StepNotFoundError, match="no committed step 1"):
            pins.pin(folder, 1)

    at_the_rename(monkeypatch, pin, after=True)
    assert prune(folder).apply().deleted == (1, 2, 3)
    assert pins.read(folder) == {}


def test_pin_step_vanishes_meanwhile_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = fsio.write_new_file

    def spy(path: Path, data: bytes) -> None:
        shutil.rmtree(folder / "step_00000001")
        write(path, data)

    monkeypatch.setattr(pins.fsio, "write_new_file", spy)
    with pytest.raises(pins.StepNotFoundError, match="deleted while it was being pinned"):
        pins.pin(folder, 1)
    assert pins.read(folder) == {}


def test_retention_reader_before_deletion_undisturbed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that comes between the decision and the deletion reads on."""
    reading = read_locks.lock_for_reading(folder / "step_00000001", what="verify")
    at_the_rename(monkeypatch, reading.__enter__)
    assert prune(folder).apply().deleted == (2, 3)
    assert (folder / "step_00000001" / "manifest.json").exists()
    reading.__exit__(None, None, None)


def test_retention_newest_set_aside_stops_deletion(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rollback that sets the newest step aside meanwhile must not leave the run without any."""
    at_the_rename(
        monkeypatch, lambda: (folder / "step_00000004").rename(folder / "rolledback.step_00000004.1")
    )
    assert prune(folder).apply().deleted == (1,)
    assert paths.committed_steps(folder) == [3, 2]


def test_retention_concurrent_prunes_do_not_conflict(folder: Path) -> None:
    for step in range(5, 60):
        write_step(folder, step)
    barrier, results = threading.Barrier(3), []

    def work() -> None:
        found = prune(folder)
        barrier.wait(timeout=60)
        results.append(found.apply())

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.warnings for result in results] == [(), (), ()]
    assert sorted(step for result in results for step in result.deleted) == list(range(1, 59))
    assert os.listdir(folder) == ["step_00000059"]


def test_retention_concurrent_pins_never_deleted(folder: Path) -> None:
    """Whatever the timing: a pin that was made counts, one that was refused left nothing."""
    for step in range(5, 120):
        write_step(folder, step)
    pinned, refused = [], []

    def pin_them() -> None:
        for step in range(1, 119):
            try:
                pins.pin(folder, step)
                pinned.append(step)
            except pins.StepNotFoundError:
                refused.append(step)

    pinning = threading.Thread(target=pin_them)
    pinning.start()
    deleted = prune(folder).apply().deleted
    pinning.join()
    assert set(pinned).isdisjoint(deleted)
    assert sorted([*pins.read(folder)]) == pinned
    assert set(pinned) <= set(paths.committed_steps(folder))


# Storage that fails


def test_retention_deletion_fails_reported_and_retried(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    delete = fsio.delete_tree

    def fail(doomed: Path) -> None:
        if "00000002" in doomed.name:
            raise OSError(5, "Input/output error", str(doomed))
        delete(doomed)

    found = prune(folder)
    with monkeypatch.context() as patch:
        patch.setattr(fsio, "delete_tree", fail)
        result = found.apply()
    assert result.deleted == (1, 2, 3)
    assert len(result.warnings) == 1
    assert "step_00000002.deleting could not be deleted: [Errno 5]" in result.warnings[0]
    assert set(os.listdir(folder)) == {"step_00000004", ".step_00000002.deleting"}
    assert found.apply() == Pruned()
    assert os.listdir(folder) == ["step_00000004"]


def test_retention_rename_fails_step_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pruner.os, "rename", fail)
    result = prune(folder).apply()
    assert result.deleted == ()
    assert [warning.partition(":")[0] for warning in result.warnings] == [
        f"step {step} could not be deleted" for step in (1, 2, 3)
    ]
    assert paths.committed_steps(folder) == [4, 3, 2, 1]


def test_retention_pins_unreadable_step_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step stays when it is not known who relies on it."""

    def fail(_: Path) -> None:
        raise OSError(5, "Input/output error")

    found = prune(folder)
    facts = found.survey()
    monkeypatch.setattr(found, "survey", lambda: facts)
    monkeypatch.setattr(pruner.pins, "read", fail)
    assert found.apply() == Pruned()
    assert paths.committed_steps(folder) == [4, 3, 2, 1]


def test_retention_unreadable_step_stays_not_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = pruner.load_resumable

    def fail(path: Path, **known: Any) -> object:
        if path.name == "step_00000004":
            raise OSError(116, "Stale file handle")
        return load(path, **known)

    monkeypatch.setattr(pruner, "load_resumable", fail)
    assert prune(folder).apply().deleted == (1, 2)
    assert paths.committed_steps(folder) == [4, 3]


def test_pin_is_of_the_step_that_was_pinned(folder: Path) -> None:
    """A rollback made room for another step of that number."""
    write_step(folder, 5, run_id="abc", attempt=1)
    assert pins.pin(folder, 5)
    assert not pins.pin(folder, 5)
    (folder / "step_00000005").rename(folder / "rolledback.step_00000005.1")
    for step in (5, 6, 7):
        write_step(folder, step, run_id="abc", attempt=2)
    assert prune(folder).apply().deleted == (1, 2, 3, 4, 5, 6)
    write_step(folder, 5, run_id="abc", attempt=2)
    assert pins.pin(folder, 5), "the pin of the other step is replaced"
    assert prune(folder).apply().deleted == ()


def test_disk_space_linked_bytes_are_not_freed(folder: Path, tmp_path: Path) -> None:
    config = CheckpointConfig.model_validate({"keep_last_n": 1})
    room = DiskSpaceGuard(folder, config)
    alone = room._freed_by([1])
    shard = next((folder / "step_00000001").glob("*.safetensors"))
    os.link(shard, tmp_path / "linked")
    assert room._freed_by([1]) == alone - shard.stat().st_size


def test_disk_space_file_of_two_deleted_steps_is_freed(folder: Path) -> None:
    room = DiskSpaceGuard(folder, CheckpointConfig.model_validate({"keep_last_n": 1}))
    alone = room._freed_by([1])
    first, second = (next((folder / f"step_0000000{n}").glob("*.safetensors")) for n in (1, 2))
    shared_bytes = first.stat().st_size
    second.unlink()
    os.link(first, second)
    assert room._freed_by([1]) == alone - shared_bytes
    assert room._freed_by([1, 2]) == 2 * alone - shared_bytes
