"""Which steps belong to a run's timeline; rollback and its undoing; forks. On real checkpoints."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.rollback_fixtures import names, quiet, resume
from support.step_maker import resign, write_step

from kempnerforge.checkpoint.format import manifest, paths
from kempnerforge.checkpoint.retention import disk_space
from kempnerforge.checkpoint.run import lease, lineage, metadata
from kempnerforge.checkpoint.run.lineage import ResumePoint, late_arrivals
from kempnerforge.checkpoint.run.metadata import RunRecord
from kempnerforge.checkpoint.run.resume_report import Receipt
from kempnerforge.checkpoint.tools import fork as forking
from kempnerforge.checkpoint.tools import rollback
from kempnerforge.checkpoint.tools.unblock import unblock
from kempnerforge.checkpoint.tools.verify import verify
from kempnerforge.errors import (
    DamagedCheckpointError,
    KempnerForgeError,
    LeaseHeldError,
    NoSpaceError,
    NoTrainingStateError,
    RunFolderError,
    StepNotFoundError,
)

pytest_plugins = ["support.rollback_fixtures"]


@pytest.fixture
def run(ended_run: Path) -> Path:
    return ended_run


def record_of(run: Path) -> RunRecord:
    record = metadata.read(run)
    assert record is not None
    return record


def tensor_bytes(step_folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(step_folder.glob("*.safetensors")))


# The rule

CASES: dict[str, tuple[dict[int, int], list[ResumePoint], list[int]]] = {
    "nothing began again": ({4: 1, 8: 1}, [ResumePoint(1, 0)], []),
    "it was resumed from": ({4: 1, 8: 1}, [ResumePoint(1, 0), ResumePoint(2, 8)], []),
    "it came after the takeover": ({4: 1, 8: 1}, [ResumePoint(1, 0), ResumePoint(2, 4)], [8]),
    "the new attempt's own": ({4: 1, 8: 2}, [ResumePoint(1, 0), ResumePoint(2, 4)], []),
    "two takeovers later": ({4: 1, 12: 2, 16: 1}, [ResumePoint(2, 4), ResumePoint(3, 12)], [16]),
    "a fresh start left all behind": ({4: 1}, [ResumePoint(1, 0), ResumePoint(2, 0)], [4]),
    "attempts that never got to a step": ({4: 1, 8: 5}, [ResumePoint(1, 0), ResumePoint(5, 4)], []),
    "rolled back": ({4: 1, 8: 1, 12: 2}, [ResumePoint(2, 8), ResumePoint(3, 4, is_rollback=True)], [8, 12]),
    "after a rollback": (
        {4: 1, 8: 4},
        [ResumePoint(2, 8), ResumePoint(3, 4, is_rollback=True), ResumePoint(4, 4)],
        [],
    ),
    "no receipts": ({4: 1, 8: 2}, [], []),
}


@pytest.mark.parametrize("case", CASES)
def test_timeline_step_counts_unless_later_began_below(case: str) -> None:
    committed, cuts, left = CASES[case]
    assert sorted(late_arrivals(committed, cuts)) == left


def test_timeline_rollback_named_before_resume() -> None:
    assert late_arrivals({8: 1}, [ResumePoint(2, 4, is_rollback=True), ResumePoint(3, 4)])[8].is_rollback


def test_timeline_trusted_steps_not_read(run: Path) -> None:
    Receipt(2, source="resume", step=8).write(run)
    cuts = lineage.cuts(run)
    folder = run / "checkpoints"
    assert lineage.set_aside_late(folder, cuts, run_id="abc", trusted={12}) == []
    assert lineage.set_aside_late(folder, cuts, run_id="of another run") == []
    (folder / "step_00000012" / paths.MANIFEST).write_text("{")
    assert lineage.set_aside_late(folder, cuts, run_id="abc") == [], "damage is for the resume to find"


def test_timeline_fresh_start_elsewhere_keeps_steps(run: Path) -> None:
    # Attempt 2 was started with another checkpoint.dir, saw no steps and began at 0.
    Receipt(2, step=0).write(run)
    assert resume(run) == 12
    assert not paths.list_folder(run / "checkpoints").late


def test_timeline_last_attempt_from_receipts(run: Path) -> None:
    Receipt(9, source="resume", step=12).write(run)
    (run / "run.json").unlink()
    assert lineage.last_attempt(run) == 9


# Rollback


def test_rollback_begins_timeline_of_same_run(run: Path) -> None:
    done = rollback.roll_back(run, 8, progress=quiet)
    record = record_of(run)
    assert (record.run_id, record.timeline_id, record.timeline_first_attempt) == ("abc", "abc-rollback2", 2)
    assert done.timeline_id == "abc-rollback2"
    assert record.attempt == 2
    again = rollback.roll_back(run, 4, progress=quiet)
    assert again.timeline_id == "abc-rollback3"
    assert len(record_of(run).rollbacks) == 2
    # wandb logs a timeline under its id, and the file has always named the id after it.
    stored = json.loads((run / "run.json").read_text())
    assert [(one["wandb_id"], one["wandb_first_attempt"]) for one in (*stored["rollbacks"], stored)] == [
        ("abc", 0),
        ("abc-rollback2", 2),
        ("abc-rollback3", 3),
    ]


def test_rollback_to_newest_step_changes_nothing(run: Path) -> None:
    before = (run / "run.json").read_bytes()
    assert rollback.roll_back(run, 12, progress=quiet).renamed == {}
    assert (run / "run.json").read_bytes() == before


@pytest.mark.parametrize("kept", range(3))
def test_rollback_killed_completed_by_next_start(
    run: Path, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.rename
    done: list[Path] = []

    def rename(self: Path, target: Path) -> Path:
        if len(done) == kept:
            raise KeyboardInterrupt
        done.append(self)
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        if kept < 2:
            with pytest.raises(KeyboardInterrupt):
                rollback.roll_back(run, 4, progress=quiet)
        else:
            rollback.roll_back(run, 4, progress=quiet)
    assert resume(run) == 4
    assert [path.name for path in sorted(paths.list_folder(run / "checkpoints").rolled_back)] == [
        "rolledback.step_00000008.1",
        "rolledback.step_00000012.1",
    ]


def test_rollback_record_unwritable_changes_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(metadata, "write", fail)
        with pytest.raises(RunFolderError, match=r"could not be rolled back: .*No space left"):
            rollback.roll_back(run, 4, progress=quiet)
    assert resume(run) == 12


def test_rollback_step_of_unknown_owner_changes_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step may be another run's, which must not be renamed."""
    step, read = run / "checkpoints/step_00000008", manifest.read

    def fail(folder: Path) -> manifest.Manifest:
        if folder == step:
            raise OSError(5, "Input/output error")
        return read(folder)

    before = sorted(path.name for path in step.parent.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "read", fail)
        with pytest.raises(RunFolderError, match=r"could not be rolled back: .*Input/output error"):
            rollback.roll_back(run, 4, progress=quiet)
    assert sorted(path.name for path in step.parent.iterdir()) == before


def test_rollback_of_live_run_refused(run: Path) -> None:
    held = lease.acquire(run, renew_every_s=0.05)
    with pytest.raises(LeaseHeldError, match="is being written by attempt 1"):
        rollback.roll_back(run, 4, progress=quiet)
    held.check()
    held.release()
    assert "step_00000012" in names(run)


def test_rollback_to_missing_or_damaged_step_refused(run: Path) -> None:
    with pytest.raises(StepNotFoundError, match="no committed step 6; its steps: 12, 8, 4"):
        rollback.roll_back(run, 6, progress=quiet)
    shard = next((run / "checkpoints" / "step_00000004").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DamagedCheckpointError) as caught:
        rollback.roll_back(run, 4, progress=quiet)
    for part in ("step_00000004 is damaged", shard.name, "Nothing was changed", "12, 8", "ckpt verify"):
        assert part in str(caught.value)
    assert record_of(run).rollbacks == ()
    assert resume(run) == 12


def test_rollback_not_a_run_folder_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(RunFolderError, match="is not a run's folder"):
            rollback.roll_back(folder, 4, progress=quiet)


def test_rollback_moved_checkpoints_found(run: Path, tmp_path: Path) -> None:
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    metadata.write(run, replace(record_of(run), checkpoint_dir=str(tmp_path / "elsewhere")))
    done = rollback.roll_back(run, 8, progress=quiet)
    assert done.folder == str(tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "rolledback.step_00000012.1").is_dir()


def test_rollback_undo_until_attempt_resumes(run: Path) -> None:
    before = {path.name: tensor_bytes(path) for path in (run / "checkpoints").glob("step_*")}
    rollback.roll_back(run, 8, progress=quiet)
    rollback.roll_back(run, 4, progress=quiet)
    assert rollback.undo(run).newest_step == 8
    assert record_of(run).timeline_id == "abc-rollback2"
    done = rollback.undo(run)
    assert (done.newest_step, done.renamed) == (12, {"rolledback.step_00000012.1": "step_00000012"})
    assert {path.name: tensor_bytes(path) for path in (run / "checkpoints").glob("step_*")} == before
    assert os.readlink(run / "checkpoints" / "latest") == "step_00000012"
    record = record_of(run)
    assert (record.timeline_id, record.timeline_first_attempt, record.rollbacks) == ("abc", 0, ())
    assert resume(run) == 12
    with pytest.raises(StepNotFoundError, match="no rollback"):
        rollback.undo(run)
    rollback.roll_back(run, 8, progress=quiet)
    resume(run)
    with pytest.raises(RunFolderError, match=r"cannot be undone.*ckpt fork .*rolledback\.step_00000012\.1"):
        rollback.undo(run)


# Fork


@pytest.mark.parametrize("link", [False, True])
def test_fork_is_own_run_that_resumes_at_step(run: Path, tmp_path: Path, link: bool) -> None:
    seen: list[tuple[int, int]] = []
    source = run / "checkpoints" / "step_00000008"
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in source.iterdir()}
    new = tmp_path / "deep" / "new"
    done = forking.fork(source, new, link=link, progress=lambda *progress: seen.append(progress))
    copy = new / "checkpoints" / "step_00000008"
    assert verify(copy).sound
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == {
        path.name: data for path, (data, _) in before.items()
    }
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in source.iterdir()} == before
    shared = [
        path.name for path in copy.iterdir() if path.stat().st_ino == (source / path.name).stat().st_ino
    ]
    assert len(shared) == (done.linked_files if link else 0)
    assert bool(shared) is link
    record = record_of(new)
    assert record.run_id == done.run_id != "abc"
    assert (record.timeline_id, record.attempt, record.global_batch_size) == (record.run_id, 0, 6)
    assert record.parent is not None
    assert (record.parent.run_id, record.parent.step, record.parent.path) == ("abc", 8, str(source))
    assert seen[-1] == (done.size_bytes, done.size_bytes)
    assert seen == sorted(seen)
    assert sorted(path.name for path in new.parent.iterdir()) == ["new"]
    assert sorted(path.name for path in new.iterdir()) == ["checkpoints", "run.json"]
    assert resume(new) == 8
    assert resume(new) == 8
    assert resume(run) == 12


def test_fork_of_rolled_back_step_resumes(run: Path, tmp_path: Path) -> None:
    rollback.roll_back(run, 4, progress=quiet)
    aside = run / "checkpoints" / "rolledback.step_00000012.1"
    assert forking.fork(aside, tmp_path / "new", link=False, progress=quiet).step == 12
    assert resume(tmp_path / "new") == 12


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


ConfigIssue = Callable[[Path, Path], object]
BAD_FORKS: dict[str, tuple[ConfigIssue, type[KempnerForgeError], str]] = {
    "no such step": (lambda step, _: shutil.rmtree(step), StepNotFoundError, "is not a committed checkpoint"),
    "not committed": (lambda step, _: (step / paths.MANIFEST).unlink(), StepNotFoundError, "manifest"),
    "a damaged shard": (
        lambda step, _: flip(next(step.glob("*.safetensors"))),
        DamagedCheckpointError,
        "wrong digest",
    ),
    "a damaged manifest": (
        lambda step, _: flip(step / paths.MANIFEST),
        DamagedCheckpointError,
        "step_00000008 is damaged",
    ),
    "a missing file": (lambda step, _: (step / paths.INDEX).unlink(), DamagedCheckpointError, "index"),
    "a taken name": (lambda _, new: new.mkdir(), RunFolderError, "exists; a fork creates a new"),
    "a file in the way": (
        lambda _, new: new.parent.joinpath("in").touch(),
        RunFolderError,
        "cannot be created",
    ),
    "another fork": (lambda _, new: (new.parent / ".new.fork").mkdir(), RunFolderError, "another fork"),
}


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("case", BAD_FORKS)
def test_fork_refused_leaves_nothing(run: Path, tmp_path: Path, case: str, link: bool) -> None:
    damage, error, text = BAD_FORKS[case]
    new = tmp_path / "new"
    damage(run / "checkpoints" / "step_00000008", new)
    before = sorted(tmp_path.rglob("*"))
    target = tmp_path / "in" / "new" if case == "a file in the way" else new
    with pytest.raises(error, match=text):
        forking.fork(run / "checkpoints" / "step_00000008", target, link=link, progress=quiet)
    assert [path for path in sorted(tmp_path.rglob("*")) if path.name != "holds"] == before


def test_fork_without_space_not_begun(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_space, "RESERVE_FILES", 1 << 62)
    with pytest.raises(NoSpaceError, match="would not fit"):
        forking.fork(run / "checkpoints" / "step_00000008", tmp_path / "new", link=False, progress=quiet)
    assert not list(tmp_path.glob("*new*"))


def test_fork_impossible_links_become_copies(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    done = forking.fork(run / "checkpoints" / "step_00000008", tmp_path / "new", link=True, progress=quiet)
    assert (done.linked_files, done.copied_files) == (0, 4)
    assert verify(tmp_path / "new" / "checkpoints" / "step_00000008").sound


def test_fork_impossible_links_need_room(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(disk_space, "RESERVE_FILES", 1 << 62)
    with pytest.raises(NoSpaceError, match="would not fit"):
        forking.fork(run / "checkpoints" / "step_00000008", tmp_path / "new", link=True, progress=quiet)
    assert not list(tmp_path.glob("*new*"))


def test_fork_of_weights_alone_is_refused(tmp_path: Path) -> None:
    """What `kempnerforge import` makes: a run that consists of it could never start."""
    step = write_step(tmp_path / "steps", 0)
    (step / paths.TRAIN_STATE).write_text('{"imported_from": "elsewhere"}')
    resign(step)
    with pytest.raises(NoTrainingStateError, match=r"checkpoint\.load_path = "):
        forking.fork(step, tmp_path / "new", link=False, progress=quiet)
    assert not (tmp_path / "new").exists()


# Suspect steps


def suspect(run: Path, step: int) -> Path:
    """Attempts blamed ``step``: it is set aside, as a start that goes on from the one before it does."""
    return lineage.set_aside(run / "checkpoints", step, paths.suspect_name)


def test_unblock_suspect_steps_named_back(run: Path) -> None:
    """Two were set aside, one after the other, and what went on from below committed nothing."""
    suspect(run, 12)
    Receipt(2, step=8, source="resume").write(run)
    suspect(run, 8)
    Receipt(3, step=4, source="resume").write(run)
    metadata.write(run, replace(record_of(run), attempt=3))
    done = unblock(run)
    assert sorted(done.renamed.values()) == ["step_00000008", "step_00000012"]
    assert (done.left, done.attempt, record_of(run).attempt) == ({}, 4, 4)
    assert lineage.set_aside_late(run / "checkpoints", lineage.cuts(run), run_id="abc") == []
    Receipt(5, step=4, source="resume").write(run)  # what is left behind later is late as ever
    late = lineage.set_aside_late(run / "checkpoints", lineage.cuts(run), run_id="abc")
    assert [path.name for path in late] == ["late.step_00000012.1", "late.step_00000008.1"]


def test_unblock_newer_timeline_leaves_suspect_aside(run: Path) -> None:
    suspect(run, 12)
    suspect(run, 8)
    Receipt(2, step=4, source="resume").write(run)
    write_step(run / "checkpoints", 6, attempt=2, run_id="abc")
    metadata.write(run, replace(record_of(run), attempt=2))
    done = unblock(run)
    assert done.renamed == {}
    assert set(done.left) == {"suspect.step_00000012.1", "suspect.step_00000008.1"}
    assert set(done.left.values()) == {"the run has since resumed from step 4 and committed step 6"}
    assert paths.committed_steps(run / "checkpoints") == [6, 4]


def test_unblock_suspect_without_newer_attempt_named_back(run: Path) -> None:
    """The start that set it aside was killed before it wrote a receipt."""
    suspect(run, 12)
    assert unblock(run).renamed == {"suspect.step_00000012.1": "step_00000012"}
    assert record_of(run).restored == ()
    held = lease.acquire(run, after_attempt=9)
    with pytest.raises(LeaseHeldError, match="not blocked"):
        unblock(run)
    held.release()
