"""A run whose records know of a committed step, and whose folder has none; and going back to step 0."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.ckpt_cli import Ckpt
from support.rollback_fixtures import names, quiet, resume
from support.step_maker import flip_byte, write_step

from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.load import candidates as resuming
from kempnerforge.checkpoint.run import claim, known_steps, lineage, metadata
from kempnerforge.checkpoint.run.metadata import Parent, Rollback, RunRecord
from kempnerforge.checkpoint.run.owner import OWNER_FILE
from kempnerforge.checkpoint.run.resume_report import Receipt
from kempnerforge.checkpoint.tools import rollback
from kempnerforge.errors import NoSoundCheckpointError, RunFolderError, StepNotFoundError, StepsMissingError
from kempnerforge.goodput.event_log import Ledger

pytest_plugins = ["support.rollback_fixtures", "support.ckpt_fixtures"]


@pytest.fixture
def run(ended_run: Path) -> Path:
    Ledger(ended_run, 1).write("commit", step=12, total_s=0.1, blocking_s=0.1)
    return ended_run


def start(run: Path) -> int | None:
    """What a start looks at, up to the step that it chooses; None for a fresh start."""
    record = metadata.read(run)
    assert record is not None
    folder = record.checkpoint_folder(run)
    owner = claim.take(folder, record.run_id, run)
    lineage.set_aside_late(folder, lineage.cuts(run), run_id=record.run_id, at_start=True)
    found = resuming.select(folder, [], owner=owner, run_dir=run)
    if found is None:
        known_steps.require_known(folder, run, owner)
    return found.step if found is not None else None


# What is known

RECORDS: dict[str, tuple[list[dict[str, object]], list[tuple[int, int]], list[Rollback], int | None]] = {
    "nothing": ([], [], [], None),
    "killed before the first commit": ([{"attempt": 1}], [], [], None),
    "a commit": ([{"attempt": 1}], [(4, 1), (8, 1)], [], 8),
    "step 0 alone": ([{"attempt": 1}], [(0, 1)], [], 0),
    "a resume": ([{"attempt": 1}, {"attempt": 2, "source": "resume", "step": 8}], [], [], 8),
    "a warm start is from elsewhere": ([{"attempt": 1, "source": "warm start", "step": 50}], [], [], None),
    "left behind by a resume": ([{"attempt": 2, "source": "resume", "step": 4}], [(8, 1)], [], 4),
    "left behind by a fresh start": ([{"attempt": 1}, {"attempt": 2}], [(8, 1)], [], None),
    "rolled back": ([{"attempt": 1}], [(4, 1), (8, 1)], [Rollback(2, 4, 1.0, "w", 1, [])], 4),
    "rolled back to the beginning": (
        [{"attempt": 1}],
        [(0, 1), (8, 1)],
        [Rollback(2, 0, 1.0, "w", 1, [])],
        None,
    ),
    "committed since": ([{"attempt": 3}], [(8, 1), (4, 3)], [Rollback(2, 0, 1.0, "w", 1, [])], 4),
}


@pytest.mark.parametrize("case", RECORDS)
def test_known_step_of_present_timeline(tmp_path: Path, case: str) -> None:
    receipts, commits, rollbacks, step = RECORDS[case]
    metadata.write(tmp_path, RunRecord("abc", "abc", 1.0, 9, rollbacks=tuple(rollbacks)))
    for receipt in receipts:
        Receipt(**receipt).write(tmp_path)  # type: ignore[arg-type]
    for committed, attempt in commits:
        Ledger(tmp_path, attempt).write("commit", step=committed, total_s=0.1, blocking_s=0.1)
    found = known_steps.newest_known(tmp_path)
    assert (found.step if found is not None else None) == step
    if step is None:
        assert claim.take(tmp_path / "checkpoints", "abc", tmp_path).run_id == "abc"
    else:
        with pytest.raises(StepsMissingError, match=f"step {step} was committed"):
            claim.take(tmp_path / "checkpoints", "abc", tmp_path)
        assert not (tmp_path / "checkpoints").exists()


def test_known_step_of_fork_is_its_first(tmp_path: Path) -> None:
    """With another ``checkpoint.dir`` than the fork was made with."""
    record = RunRecord("abc", "abc", 1.0, checkpoint_dir=str(tmp_path / "x"), parent=Parent("old", 8, "/old"))
    metadata.write(tmp_path, record)
    with pytest.raises(StepsMissingError, match="starts at step 8 of the run that it was forked from"):
        claim.take(tmp_path / "x", "abc", tmp_path)


# Starts


@pytest.mark.parametrize("what", ["folder", "steps", "steps and owner"])
def test_start_without_known_steps_refused(run: Path, what: str) -> None:
    assert start(run) == 12
    folder = run / "checkpoints"
    if what == "folder":
        shutil.rmtree(folder)
    else:
        for path in folder.glob("step_*"):
            shutil.rmtree(path)
        (folder / "latest").unlink()
        if what == "steps and owner":
            (folder / OWNER_FILE).unlink()
    before = names(run) if folder.exists() else None
    with pytest.raises(StepsMissingError) as caught:
        start(run)
    assert (names(run) if folder.exists() else None) == before
    assert caught.value.exit_status == 2
    for part in (str(folder), "step 12 was committed", "not mounted", "purged", f"ckpt rollback {run} 0"):
        assert part in str(caught.value)


def test_start_with_steps_of_others_only_refused(run: Path) -> None:
    start(run)
    for path in (run / "checkpoints").glob("step_*"):
        shutil.rmtree(path)
    write_step(run / "checkpoints", 20, run_id="other")
    with pytest.raises(StepsMissingError):
        start(run)


def test_start_with_quarantined_steps_names_them(run: Path) -> None:
    for step in (4, 8, 12):
        flip_byte(run / "checkpoints" / paths.step_name(step) / paths.TRAIN_STATE, 3)
    for _ in range(2):
        with pytest.raises(
            NoSoundCheckpointError, match=r"(?s)quarantined\.step_00000012\.1.*rollback RUN 0"
        ):
            start(run)


# Back to the beginning


def test_rollback_to_beginning_and_undo(run: Path) -> None:
    done = rollback.roll_back(run, 0, progress=quiet)
    assert sorted(done.renamed) == ["step_00000004", "step_00000008", "step_00000012"]
    assert not (run / "checkpoints" / "latest").is_symlink()
    assert rollback.undo(run).newest_step == 12
    assert start(run) == 12
    rollback.roll_back(run, 0, progress=quiet)
    assert start(run) is None
    Receipt(9).write(run)
    assert start(run) is None
    with pytest.raises(RunFolderError, match=r"cannot be undone.*ckpt fork"):
        rollback.undo(run)


@pytest.mark.parametrize("kept", range(3))
def test_rollback_to_beginning_killed_is_completed(
    run: Path, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, done = Path.rename, []

    def rename(self: Path, target: Path) -> Path:
        if len(done) == kept:
            raise KeyboardInterrupt
        done.append(self)
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            rollback.roll_back(run, 0, progress=quiet)
    assert start(run) is None
    assert len(paths.list_folder(run / "checkpoints").rolled_back) == 3


def test_rollback_to_beginning_of_purged_run(run: Path) -> None:
    """The way on that the refused start names. What comes back later is of the old timeline."""
    (run / "checkpoints").rename(run / "gone")
    done = rollback.roll_back(run, 0, progress=quiet)
    assert done.changed
    assert done.renamed == {}
    assert not (run / "checkpoints").exists()
    assert start(run) is None
    shutil.rmtree(run / "checkpoints")
    (run / "gone").rename(run / "checkpoints")
    assert start(run) is None
    assert len(paths.list_folder(run / "checkpoints").rolled_back) == 3
    again = rollback.roll_back(run, 0, progress=quiet)
    assert not again.changed


def test_rollback_to_beginning_gives_quarantined_up(run: Path) -> None:
    for step in (4, 8, 12):
        (run / "checkpoints" / paths.step_name(step) / paths.MANIFEST).write_text("{")
    with pytest.raises(NoSoundCheckpointError):
        start(run)
    rollback.roll_back(run, 0, progress=quiet)
    assert start(run) is None
    # The new timeline's own damage counts again.
    newer = write_step(run / "checkpoints", 4, run_id="abc", attempt=9)
    flip_byte(newer / paths.TRAIN_STATE, 3)
    for _ in range(2):
        with pytest.raises(NoSoundCheckpointError):
            start(run)


def test_rollback_to_committed_step_0_goes_on_from_it(run: Path) -> None:
    write_step(run / "checkpoints", 0, run_id="abc")
    done = rollback.roll_back(run, 0, progress=quiet)
    assert (done.newest_step, len(done.renamed)) == (0, 3)
    assert start(run) == 0
    assert resume(run) == 0


def test_rollback_of_fork_to_beginning(tmp_path: Path) -> None:
    """The step that it began with goes too, also when the command was killed before."""
    record = RunRecord("abc", "abc", 1.0, parent=Parent("old", 8, "/old"))
    metadata.write(tmp_path, record)
    write_step(tmp_path / "checkpoints", 8, run_id="old", attempt=5)
    assert start(tmp_path) == 8
    begun = rollback._begin_timeline(record, 3, 0, [])
    metadata.write(tmp_path, begun)
    owner = claim.take(tmp_path / "checkpoints", "abc", tmp_path)
    lineage.set_aside_late(
        tmp_path / "checkpoints",
        lineage.cuts(tmp_path),
        run_id="abc",
        parent=(owner.parent_run_id, owner.parent_step),
        at_start=True,
    )
    assert start(tmp_path) is None


def test_rollback_leaves_foreign_steps(run: Path) -> None:
    start(run)
    foreign = write_step(run / "checkpoints", 10, run_id="other")
    done = rollback.roll_back(run, 8, progress=quiet)
    assert list(done.renamed) == ["step_00000012"]
    assert foreign.is_dir()
    with pytest.raises(StepNotFoundError, match=r"step 10 in .* belongs to another run, other"):
        rollback.roll_back(run, 10, progress=quiet)
    assert start(run) == 8


def test_ckpt_rollback_0_tells_what_follows(run: Path, ckpt: Ckpt) -> None:
    body = json.loads(ckpt("rollback", run, "0", "--json").out)
    assert (body["newest_step"], body["changed"], len(body["renamed"])) == (0, True, 3)
    assert "nothing was changed" in ckpt("rollback", run, "0").out
    assert ckpt("rollback", run, "--undo").status == 0
    said = ckpt("rollback", run, "0")
    assert said.status == 0
    assert "will start again at step 0" in said.out
    assert "--undo" in said.out


# Other commands


@pytest.fixture
def shared(run: Path) -> Path:
    """The run, with a newer step of another run in its folder."""
    start(run)
    write_step(run / "checkpoints", 16, run_id="other")
    return run


def test_ckpt_commands_tell_foreign_steps(shared: Path, ckpt: Ckpt) -> None:
    lines = {line.split()[0]: line for line in ckpt("ls", shared).out.splitlines()}
    assert "of another run: other" in lines["16"]
    assert "another run" not in lines["12"]
    steps = {one["step"]: one for one in json.loads(ckpt("ls", shared, "--json").out)["steps"]}
    assert [steps[16]["another_runs"], steps[12]["another_runs"]] == [True, False]
    assert "of another run, other: left as it is" in ckpt("explain", shared, "16").out
    verified = ckpt("verify", shared)
    assert verified.status == 0
    assert OWNER_FILE not in verified.out
    by_folder = json.loads(ckpt("ls", shared / "checkpoints", "--json").out)["steps"]
    assert [one["step"] for one in by_folder if one["another_runs"]] == [16]


def test_ckpt_prune_leaves_foreign_steps(shared: Path, ckpt: Ckpt) -> None:
    """Neither they nor their config, which would say what to keep, count."""
    config = "[train]\nglobal_batch_size = 6\n[checkpoint]\nkeep_last_n = {}\n"
    folder = shared / "checkpoints"
    write_step(folder, 14, run_id="abc", attempt=2, config=config.format(2))
    write_step(folder, 18, run_id="other", config=config.format(1))
    assert json.loads(ckpt("prune", shared, "--json").out)["steps"] == [4, 8]
    assert paths.committed_steps(folder) == [18, 16, 14, 12]


def test_ckpt_of_run_refused_in_anothers_folder(shared: Path, tmp_path: Path, ckpt: Ckpt) -> None:
    """Its ``run.json`` names a folder that another run owns since."""
    victim = tmp_path / "victim"
    victim.mkdir()
    record = RunRecord("vvvv", "vvvv", 1.0, checkpoint_dir=str(shared / "checkpoints"))
    metadata.write(victim, record)
    for command in (("ls",), ("prune",), ("rollback", "--undo")):
        done = ckpt(command[0], victim, *command[1:])
        assert done.status == 2
        assert f"in {shared}" in done.err
    with pytest.raises(RunFolderError, match="holds the checkpoints of"):
        rollback.roll_back(victim, 4, progress=quiet)


def test_ckpt_finds_run_of_moved_folder(shared: Path, tmp_path: Path, ckpt: Ckpt) -> None:
    moved = tmp_path / "moved"
    (shared / "checkpoints").rename(moved)
    record = metadata.read(shared)
    assert record is not None
    metadata.write(shared, RunRecord("abc", "abc", 1.0, 1, checkpoint_dir=str(moved)))
    assert str(shared) in ckpt("rollback", moved, "8").out
