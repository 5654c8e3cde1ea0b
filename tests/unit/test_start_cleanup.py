"""What a start tidies up, where it cannot: real entries that nobody renames or deletes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from support.step_maker import flip_byte, write_step
from support.stubborn_files import bind_mounted, immutable, over_lower_layer

from kempnerforge import fsio
from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.load import candidates
from kempnerforge.checkpoint.retention import pins
from kempnerforge.checkpoint.retention.policy import KeepPolicy
from kempnerforge.checkpoint.retention.pruner import Retention
from kempnerforge.checkpoint.retention.start_cleanup import StartCleanup
from kempnerforge.checkpoint.run.lineage import ResumePoint
from kempnerforge.checkpoint.run.resume_report import Receipt, Rejected
from kempnerforge.config.schema import CheckpointConfig
from kempnerforge.errors import NoSoundCheckpointError, UnreachableCheckpointError

LEFTOVER = ".step_00000009.1.tmp"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sound steps 2 and 4, and a folder in flight of attempt 1."""
    checkpoints = tmp_path / "checkpoints"
    for step in (2, 4):
        write_step(checkpoints, step)
    shutil.copytree(checkpoints / paths.step_name(4), checkpoints / LEFTOVER)
    return checkpoints


def damage(folder: Path, step: int) -> None:
    flip_byte(folder / paths.step_name(step) / paths.MANIFEST, 40)


def test_cleanup_undeletable_leftover_stays_with_one_warning(folder: Path) -> None:
    """One file of a folder in flight is immutable: all else in it goes, and the start goes on."""
    with immutable(folder / LEFTOVER / paths.INDEX):
        cleanup = StartCleanup(folder, attempt=2)
        cleanup.remove_leftovers()
        (warning,) = cleanup.warnings
        assert "could not be deleted" in warning
        assert "Operation not permitted" in warning
        (left,) = [path for path in folder.iterdir() if path.name.endswith(".deleting")]
        assert os.listdir(left) == [paths.INDEX], "what can be deleted is deleted"
        again = StartCleanup(folder, attempt=3)
        again.remove_leftovers()
        assert len(again.warnings) == 1
        assert candidates.select(folder, [], cleanup=again).step == 4  # type: ignore[union-attr]
    last = StartCleanup(folder, attempt=4)
    last.remove_leftovers()
    assert (last.warnings, sorted(os.listdir(folder))) == ([], ["step_00000002", "step_00000004"])


def test_fence_unrenamable_folder_warns_and_goes_on(folder: Path) -> None:
    with immutable(folder / LEFTOVER):
        cleanup = StartCleanup(folder, attempt=2)
        cleanup.remove_leftovers()
        (warning,) = cleanup.warnings
        assert "could not be renamed (Operation not permitted) or deleted" in warning
        assert "the step is set aside then" in warning
        assert (folder / LEFTOVER).is_dir()


def test_cleanup_container_layer_deletes_in_place(folder: Path, tmp_path: Path) -> None:
    """A folder of a lower layer cannot be renamed (EXDEV), and can be deleted."""
    damage(folder, 4)
    with over_lower_layer(folder, tmp_path / "layers") as seen:
        cleanup = StartCleanup(seen, attempt=2)
        cleanup.remove_leftovers()
        assert cleanup.warnings == [
            f"{LEFTOVER} of an older attempt could not be renamed (Invalid cross-device link); it was deleted"
        ]
        rejected: list[Rejected] = []
        found = candidates.select(seen, rejected, cleanup=cleanup)
        assert found is not None
        assert (found.step, [(one.step, one.moved_to) for one in rejected]) == (2, [(4, "")])
        assert "step 4 is damaged and could not be renamed (Invalid cross-device link)" in cleanup.warnings[1]
        # Load errors of step 2 lead back here: nothing is looked at twice.
        assert candidates.select(seen, rejected, cleanup=cleanup) is not None
        assert len(rejected) == 1


def test_cleanup_open_file_on_nfs_is_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS keeps a deleted file that is open elsewhere, under another name. Imitated: unlink makes it anew."""
    unlink = os.unlink

    def silly(path: str, *, dir_fd: int | None = None) -> None:
        unlink(path, dir_fd=dir_fd)
        if os.fspath(path).startswith((paths.INDEX, ".nfs")):
            os.close(os.open(".nfs0000000000000001", os.O_CREAT | os.O_WRONLY, dir_fd=dir_fd))

    monkeypatch.setattr(os, "unlink", silly)
    cleanup = StartCleanup(folder, attempt=2)
    cleanup.remove_leftovers()
    (warning,) = cleanup.warnings
    assert "Directory not empty" in warning


def test_cleanup_leaves_what_is_mounted_in_leftover(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "corpus.txt").write_text("mine")
    (folder / LEFTOVER / "data").mkdir()
    with bind_mounted(data, folder / LEFTOVER / "data"):
        cleanup = StartCleanup(folder, attempt=2)
        cleanup.remove_leftovers()
        assert "a file system is mounted at" in "".join(cleanup.warnings)
        assert (data / "corpus.txt").read_text() == "mine"


def test_cleanup_leftover_gone_meanwhile_is_no_news(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def too_late(source: Path, target: Path) -> None:
        shutil.rmtree(source)
        rename(source, target)

    monkeypatch.setattr(os, "rename", too_late)
    cleanup = StartCleanup(folder, attempt=2)
    cleanup.remove_leftovers()
    assert (cleanup.warnings, sorted(os.listdir(folder))) == ([], ["step_00000002", "step_00000004"])


def test_choose_unrenamable_damaged_step_is_passed_over(folder: Path) -> None:
    damage(folder, 4)
    rejected: list[Rejected] = []
    cleanup = StartCleanup(folder, attempt=2)
    with immutable(folder / paths.step_name(4)):
        found = candidates.select(folder, rejected, cleanup=cleanup)
        assert found is not None
        assert found.step == 2
        assert "rename or delete" in cleanup.warnings[0]
        receipt = Receipt(2, source="resume", step=2, path="p", rejected=rejected, warnings=cleanup.warnings)
        assert any("step 4 was damaged and skipped" in line for line in receipt.lines())
        assert any("warning: step 4" in line for line in receipt.lines())
        assert "step 4 cannot be saved" in cleanup.in_the_way(4)
        assert cleanup.in_the_way(6) == ""
    assert cleanup.in_the_way(4) == "", "it is renamed as soon as it can be"
    assert (folder / "quarantined.step_00000004.1").is_dir()


def test_choose_only_step_passed_over_never_begins_again(folder: Path) -> None:
    for step in (2, 4):
        damage(folder, step)
    with (
        immutable(folder / paths.step_name(2)),
        immutable(folder / paths.step_name(4)),
        pytest.raises(NoSoundCheckpointError, match="step_00000004"),
    ):
        candidates.select(folder, [], cleanup=StartCleanup(folder, attempt=2))


def test_retention_counts_no_step_that_is_passed_over(folder: Path) -> None:
    """A late step keeps its name: what the run resumes from stays all the same."""
    write_step(folder, 8)
    config = CheckpointConfig.model_validate({"keep_last_n": 1})
    cleanup, retention = StartCleanup(folder, attempt=2), Retention(folder, KeepPolicy.from_config(config))
    with immutable(folder / paths.step_name(8)):
        cleanup.set_aside_late([ResumePoint(2, 4)], run_id="r")
        assert list(cleanup.passed_over) == [8]
        found = candidates.select(folder, [], cleanup=cleanup)
        assert found is not None
        assert found.step == 4
        retention.passed_over = cleanup.passed_over
        assert retention.apply().deleted == (2,)
    assert paths.committed_steps(folder) == [8, 4]


def test_choose_step_of_unknown_timeline_stops(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the newest step is late cannot be read: it is neither loaded nor passed over."""
    cleanup = StartCleanup(folder, attempt=2)
    opened = os.open

    def stale(path: str, *args: int, **options: int) -> int:
        if str(path).endswith("step_00000004/manifest.json"):
            raise OSError(116, "Stale file handle", path)
        return opened(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", stale)
        cleanup.set_aside_late([ResumePoint(1, 0)], run_id="r")
    with pytest.raises(UnreachableCheckpointError, match="Stale file handle"):
        candidates.select(folder, [], cleanup=cleanup)


def test_cleanup_gives_a_pinned_step_its_name_back(folder: Path) -> None:
    """A deletion that found a pin was killed before it could give the step back."""
    pins.pin(folder, 2)
    (folder / paths.step_name(2)).rename(folder / ".step_00000002.deleting")
    (folder / paths.step_name(4)).rename(folder / ".step_00000004.deleting")
    StartCleanup(folder, attempt=2).remove_leftovers()
    assert paths.committed_steps(folder) == [2]


def test_delete_beside_an_unfinished_deletion_of_same_name(folder: Path) -> None:
    """A step that is written and deleted a second time, while a file of the first is still there."""
    first = folder / ".step_00000002.deleting"
    first.mkdir()
    (first / "stays").touch()
    with immutable(first / "stays"):
        fsio.invalidate_then_delete(folder / paths.step_name(2))
        assert sorted(os.listdir(folder)) == [".step_00000002.deleting", LEFTOVER, "step_00000004"]
    assert paths.list_folder(folder).deleting == [first]
