"""One owner of a checkpoint folder: the file, what it refuses, what is adopted, foreign steps left alone."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.clock import FakeClock
from support.step_maker import flip_byte, write_step

from kempnerforge.checkpoint.format import manifest, paths
from kempnerforge.checkpoint.load import candidates
from kempnerforge.checkpoint.retention.policy import KeepPolicy, LastN
from kempnerforge.checkpoint.retention.pruner import Retention
from kempnerforge.checkpoint.retention.start_cleanup import StartCleanup
from kempnerforge.checkpoint.run import claim, lineage, metadata, owner
from kempnerforge.checkpoint.run.lineage import ResumePoint
from kempnerforge.checkpoint.run.metadata import Parent, RunRecord
from kempnerforge.checkpoint.run.owner import OWNER_FILE, Owner
from kempnerforge.checkpoint.run.resume_report import Receipt, Rejected
from kempnerforge.errors import (
    DamagedCheckpointError,
    FolderOwnedError,
    NoSoundCheckpointError,
    RunFolderError,
)

A, B = "aaaa", "bbbb"


def make_run(base: Path, name: str, run_id: str, folder: Path | None, parent: Parent | None = None) -> Path:
    """A run's folder with a ``run.json``, whose checkpoints are in ``folder``."""
    run_dir = base / name
    run_dir.mkdir(parents=True)
    moved = str(folder) if folder is not None else ""
    metadata.write(run_dir, RunRecord(run_id, run_id, 1.0, 1, checkpoint_dir=moved, parent=parent))
    return run_dir


def step_of(folder: Path, run_id: str, step: int, **more: Any) -> Path:
    """A committed step of a run."""
    return write_step(folder, step, run_id=run_id, **more)


def tree(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file and folder with its inode, time of change and content."""
    return {
        str(path.relative_to(folder)): (
            path.lstat().st_ino,
            path.lstat().st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in [folder, *sorted(folder.rglob("*"))]
    }


def refused(folder: Path, run_id: str, run_dir: Path) -> str:
    """What a start that must be refused says. It must change nothing in the folder."""
    before = tree(folder)
    with pytest.raises(FolderOwnedError) as caught:
        claim.take(folder, run_id, run_dir)
    assert tree(folder) == before
    assert caught.value.exit_status == 2
    return str(caught.value)


# The file


def test_owner_file_names_run_and_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    run = make_run(tmp_path, "a", A, folder)
    found = claim.take(folder, A, run)
    body = json.loads((folder / OWNER_FILE).read_text())
    assert (body["run_id"], body["run_name"], body["run_dir"], body["parent"]) == (A, "a", str(run), None)
    assert found == owner.read(folder)
    before = tree(folder)
    claim.take(folder, A, run)
    assert tree(folder) == before
    assert [path.name for path in folder.iterdir()] == [OWNER_FILE]


def test_owner_of_simultaneous_starts_is_one(tmp_path: Path) -> None:
    ids = [f"run{number}" for number in range(12)]
    barrier, won = threading.Barrier(len(ids)), []
    (tmp_path / "shared").mkdir()

    def start(run_id: str) -> None:
        barrier.wait()
        try:
            claim.take(tmp_path / "shared", run_id, tmp_path / run_id)
            won.append(run_id)
        except FolderOwnedError:
            pass

    threads = [threading.Thread(target=start, args=(run_id,)) for run_id in ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = owner.read(tmp_path / "shared")
    assert found is not None
    assert won == [found.run_id]
    assert [path.name for path in (tmp_path / "shared").iterdir()] == [OWNER_FILE]


def test_owner_without_hard_links_still_exclusive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    assert owner.create(tmp_path, Owner(A))
    assert not owner.create(tmp_path, Owner(B))
    assert owner.read(tmp_path) == Owner(A)
    assert [path.name for path in tmp_path.iterdir()] == [OWNER_FILE]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"run_id": ""}', '{"run_id": 1}', "a folder", "a link"]
)
def test_owner_file_damaged_refused_and_named(
    tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeClock().replace_in(monkeypatch, owner)
    path = tmp_path / OWNER_FILE
    if content == "a folder":
        path.mkdir()
    elif content == "a link":
        path.symlink_to("/dev/zero")
    else:
        path.write_text(content)
    with pytest.raises(RunFolderError) as caught:
        claim.take(tmp_path, A, tmp_path / "a")
    assert OWNER_FILE in str(caught.value)
    assert os.path.lexists(path)


def test_owner_left_by_kill_is_swept(tmp_path: Path) -> None:
    (tmp_path / f".{OWNER_FILE}.1234.tmp").write_text("{")
    claim.take(tmp_path, A, tmp_path / "a")
    StartCleanup(tmp_path, attempt=1, owner=Owner(A)).remove_leftovers()
    assert [path.name for path in tmp_path.iterdir()] == [OWNER_FILE]


# Refusals


def test_claim_folder_of_another_run_refused(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    first, second = make_run(tmp_path, "first", A, folder), make_run(tmp_path, "second", B, None)
    claim.take(folder, A, first)
    step_of(folder, A, 4)
    said = refused(folder, B, second)
    for part in (f"run first ({A}), in {first}", B, str(second), "--run.name=NEW", "{run_name}", "ckpt fork"):
        assert part in said
    refused(folder, "", tmp_path / "nobody")


def test_claim_by_copy_of_run_folder_refused(tmp_path: Path) -> None:
    """Both have one id, and two leases."""
    folder = tmp_path / "shared"
    run = make_run(tmp_path, "a", A, folder)
    claim.take(folder, A, run)
    shutil.copytree(run, tmp_path / "copy")
    assert "is a copy of that run's folder" in refused(folder, A, tmp_path / "copy")


def test_claim_by_moved_run_folder_follows_it(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    claim.take(folder, A, make_run(tmp_path, "a", A, folder))
    (tmp_path / "a").rename(tmp_path / "b")
    claim.take(folder, A, tmp_path / "b")
    found = owner.read(folder)
    assert found is not None
    assert found.run_dir == str(tmp_path / "b")
    refused(folder, B, make_run(tmp_path, "c", B, None))


def test_claim_by_copy_with_its_own_steps_allowed(tmp_path: Path) -> None:
    run = make_run(tmp_path, "a", A, None)
    claim.take(run / "checkpoints", A, run)
    shutil.copytree(run, tmp_path / "copy")
    claim.take(tmp_path / "copy" / "checkpoints", A, tmp_path / "copy")
    claim.take(run / "checkpoints", A, run)


def test_claim_after_lost_run_file_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    run = make_run(tmp_path, "a", A, folder)
    claim.take(folder, A, run)
    metadata.write(run, RunRecord(B, B, 1.0))
    assert f"Restore the run.json of {A}" in refused(folder, B, run)


# Folders from before owner files

ADOPTION: dict[str, tuple[list[tuple[str, int]], str]] = {
    "all of this run": ([(B, 4), (B, 8)], ""),
    "no run named": ([("", 4), (B, 8)], ""),
    "the step that a fork begins with": ([(A, 4), (B, 8)], ""),
    "another run's": ([("cccc", 4), ("cccc", 8)], "of another run: run cccc"),
    "another step of the parent": ([(A, 3), (B, 8)], f"of several runs: run {A} (step_00000003), beside"),
    "two other runs'": ([(A, 3), ("cccc", 8)], "of several runs"),
}


@pytest.mark.parametrize("case", ADOPTION)
def test_claim_adopts_when_manifests_agree(tmp_path: Path, case: str) -> None:
    steps, problem = ADOPTION[case]
    folder = tmp_path / "shared"
    run = make_run(tmp_path, "b", B, folder, parent=Parent(A, 4, "/gone"))
    for run_id, step in steps:
        step_of(folder, run_id, step)
    if problem:
        assert problem in refused(folder, B, run)
        return
    found = claim.take(folder, B, run)
    assert found == owner.read(folder)
    assert (found.parent_run_id, found.parent_step) == (A, 4)
    assert all(not found.foreign_run(folder / paths.step_name(step)) for _, step in steps)


def test_claim_judges_steps_set_aside_too(tmp_path: Path) -> None:
    step_of(tmp_path / "shared", A, 4).rename(tmp_path / "shared" / paths.rolled_back_name(4, 1))
    refused(tmp_path / "shared", B, make_run(tmp_path, "b", B, None))


def test_claim_names_other_run_by_its_config(tmp_path: Path) -> None:
    step_of(tmp_path / "shared", A, 4, config='[run]\nname = "big"\n')
    assert f"run big ({A})" in refused(tmp_path / "shared", B, make_run(tmp_path, "b", B, None))


# Steps of other runs


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """The folder of run A, with its steps 4 and 8, and 6, 10 and 12 of run B, of which 12 is damaged."""
    folder = tmp_path / "shared"
    for step in (4, 8):
        step_of(folder, A, step)
    for step in (6, 10, 12):
        step_of(folder, B, step)
    flip_byte(folder / "step_00000012" / paths.TRAIN_STATE, 3)
    (folder / OWNER_FILE).write_bytes(owner.encode(Owner(A)))
    return folder


def theirs(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    return {
        name: kept
        for name, kept in tree(folder).items()
        if name[:13] in ("step_00000006", "step_00000010", "step_00000012")
    }


def test_resume_passes_over_foreign_steps(mixed: Path) -> None:
    before = theirs(mixed)
    rejected: list[Rejected] = []
    found = candidates.select(mixed, rejected, owner=Owner(A))
    assert found is not None
    assert found.step == 8
    assert [(one.step, one.outcome, one.moved_to) for one in rejected] == [
        (12, "another run's", ""),
        (10, "another run's", ""),
    ]
    assert "step 12 was left as it is: it belongs to run bbbb" in "".join(
        Receipt(1, rejected=rejected).lines()
    )
    shutil.rmtree(mixed / "step_00000008")
    shutil.rmtree(mixed / "step_00000004")
    assert candidates.select(mixed, [], owner=Owner(A)) is None, "foreign steps do not make a run unsound"
    assert theirs(mixed) == before


def test_resume_foreign_damage_not_renamed(mixed: Path) -> None:
    (mixed / "step_00000012" / paths.INDEX).unlink()
    before = theirs(mixed)
    found = candidates.select(mixed, [], owner=Owner(A))
    assert found is not None
    assert theirs(mixed) == before


def test_start_cleanup_leaves_foreign_folders(mixed: Path) -> None:
    foreign = mixed / paths.temporary_name("step_00000020", 1)
    shutil.copytree(mixed / "step_00000010", foreign)
    doomed = mixed / ".step_00000021.deleting"
    shutil.copytree(mixed / "step_00000010", doomed)
    mine = mixed / paths.temporary_name("step_00000024", 1)
    mine.mkdir()
    cleanup = StartCleanup(mixed, attempt=9, owner=Owner(A))
    assert [path.name for path in cleanup.revoke_inflight()] == [paths.fenced_name(mine.name, 9)]
    cleanup.remove_leftovers()
    assert foreign.is_dir()
    assert doomed.is_dir()
    assert not mine.exists()
    assert paths.list_folder(mixed).deleting == [doomed]


def unreadable(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """The manifests in ``folders`` cannot be read."""
    read = manifest.read

    def refuse(folder: Path) -> manifest.Manifest:
        if folder in folders:
            raise OSError(errno.EIO, "Input/output error")
        return read(folder)

    monkeypatch.setattr(manifest, "read", refuse)


def test_start_cleanup_leaves_what_it_cannot_read(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = mixed / paths.temporary_name("step_00000020", 1)
    shutil.copytree(mixed / "step_00000010", foreign)
    unreadable(monkeypatch, foreign)
    cleanup = StartCleanup(mixed, attempt=9, owner=Owner(A))
    cleanup.remove_leftovers()
    assert foreign.is_dir()
    assert f"{foreign.name} is left as it is: its manifest cannot be read" in cleanup.warnings[0]


def test_unreadable_step_changes_nothing_known_of_others(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = mixed / "step_00000010"
    unreadable(monkeypatch, step)
    with pytest.raises(OSError, match="Input/output"):
        Owner(A).foreign_run(step)
    assert Owner(A).may_own(step)


def test_step_missing_a_file_for_a_moment_is_chosen(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, calls = manifest.load, list[Path]()

    def flicker(folder: Path, **more: Any) -> manifest.Manifest:
        calls.append(folder)
        if len(calls) == 1:
            raise DamagedCheckpointError(f"{folder.name} is damaged: index.bin is missing")
        return load(folder, **more)

    monkeypatch.setattr(manifest, "load", flicker)
    monkeypatch.setattr(candidates, "RETRY_DELAYS_S", (0.0,))
    rejected: list[Rejected] = []
    found = candidates.select(mixed, rejected, owner=Owner(B, parent_run_id=A, parent_step=8))
    assert found is not None
    assert calls[:2] == [mixed / "step_00000012"] * 2
    assert [one.step for one in rejected] == [12], "it is damaged on a second look too"


def test_retention_neither_counts_nor_deletes_foreign(mixed: Path) -> None:
    before = theirs(mixed)
    step_of(mixed, A, 9)
    retention = Retention(mixed, KeepPolicy((LastN(2),)), Owner(A))
    assert {verdict.step for verdict in retention.verdicts() if not verdict.keep} == {4}
    assert retention.apply().deleted == (4,)
    kept = {verdict.step: [reason.rule for reason in verdict.reasons] for verdict in retention.verdicts()}
    assert kept[10] == ["foreign"]
    assert kept[9] == ["newest", "last"]
    assert kept[8] == ["last"]
    assert theirs(mixed) == before


def test_late_steps_of_other_runs_stay(mixed: Path) -> None:
    before = theirs(mixed)
    cuts = [ResumePoint(1, 0), ResumePoint(2, 4)]
    moved = lineage.set_aside_late(mixed, cuts, run_id=A)
    assert [path.name for path in moved] == ["late.step_00000008.1"]
    assert theirs(mixed) == before


def test_newest_step_is_newest_of_own(mixed: Path) -> None:
    assert owner.newest_step(mixed, Owner(A)) == 8
    assert owner.newest_step(mixed, Owner("cccc")) is None
    assert owner.newest_step(mixed, owner.ANYONE) == 12


def test_all_own_steps_damaged_is_no_fresh_start(mixed: Path) -> None:
    for step in (4, 8):
        flip_byte(mixed / paths.step_name(step) / paths.TRAIN_STATE, 3)
    with pytest.raises(NoSoundCheckpointError) as caught:
        candidates.select(mixed, [], owner=Owner(A))
    assert "step_00000012" not in str(caught.value)


# What the living timeline comes from


def test_timeline_ancestors_of_newest_are_never_late(tmp_path: Path) -> None:
    """A start with another ``checkpoint.dir`` began at 0; then the run went on here, and was killed."""
    for step in (4, 8):
        step_of(tmp_path, A, step, parent_step=step - 4)
    step_of(tmp_path, A, 12, attempt=3, parent_step=8)
    cuts = [ResumePoint(1, 0), ResumePoint(2, 0), ResumePoint(3, 8)]
    assert lineage.set_aside_late(tmp_path, cuts, run_id=A, at_start=True) == []
    step_of(tmp_path, A, 10)
    moved = lineage.set_aside_late(tmp_path, cuts, run_id=A, at_start=True)
    assert [path.name for path in moved] == ["late.step_00000010.1"], (
        "the older attempt's, above where 3 began"
    )


def test_timeline_newest_damaged_keeps_the_older(tmp_path: Path) -> None:
    for step in (4, 8):
        step_of(tmp_path, A, step, parent_step=step - 4)
    step_of(tmp_path, A, 12, attempt=3, parent_step=8)
    (tmp_path / "step_00000012" / paths.MANIFEST).write_text("{")
    cuts = [ResumePoint(1, 0), ResumePoint(2, 0), ResumePoint(3, 8)]
    assert lineage.set_aside_late(tmp_path, cuts, run_id=A, at_start=True) == []
    found = candidates.select(tmp_path, [], owner=Owner(A))
    assert found is not None
    assert found.step == 8


LINES: dict[
    str, tuple[dict[int, int], dict[int, int], list[ResumePoint], list[tuple[int, int]], set[int]]
] = {
    "one attempt": ({4: 1, 8: 1}, {8: 4}, [ResumePoint(1, 0)], [], {4, 8}),
    "through two attempts": (
        {4: 1, 8: 2, 12: 3},
        {8: 4, 12: 8},
        [ResumePoint(1, 0), ResumePoint(2, 4), ResumePoint(3, 8)],
        [],
        {4, 8, 12},
    ),
    "not what was left behind": (
        {4: 1, 8: 1, 12: 2},
        {12: 4},
        [ResumePoint(1, 0), ResumePoint(2, 4)],
        [],
        {4, 12},
    ),
    "a deleted link, told by the ledger": (
        {4: 1, 12: 3},
        {12: 8},
        [ResumePoint(1, 0), ResumePoint(2, 0), ResumePoint(3, 8)],
        [(8, 1)],
        {4, 12},
    ),
    "a deleted link, not told": (
        {4: 1, 12: 3},
        {12: 8},
        [ResumePoint(1, 0), ResumePoint(2, 0), ResumePoint(3, 8)],
        [],
        {12},
    ),
    "without receipts": ({4: 1, 8: 1, 12: 2}, {8: 4, 12: 8}, [], [], {4, 8, 12}),
    "a fresh start in between": ({4: 1, 6: 2}, {6: 0}, [ResumePoint(1, 0), ResumePoint(2, 0)], [], {6}),
}


@pytest.mark.parametrize("case", LINES)
def test_timeline_line_of_newest(case: str) -> None:
    committed, parents, cuts, commits, line = LINES[case]
    assert lineage.ancestors(max(committed), committed, parents, cuts, commits) == line


def test_owner_of_fork_owns_parents_step_alone() -> None:
    fork = Owner(B, parent_run_id=A, parent_step=4)
    assert fork.is_parent(A, 4)
    assert not replace(fork, parent_run_id="", parent_step=None).is_parent("", None)
