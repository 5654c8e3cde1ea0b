"""Going back to an older step of a run, and undoing that. Later steps get another name; none is deleted."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from kempnerforge import fsio
from kempnerforge.checkpoint.format import latest_link, paths
from kempnerforge.checkpoint.run import claim, known_steps, lease, lineage, metadata, owner
from kempnerforge.checkpoint.run.metadata import Rollback, RunRecord
from kempnerforge.checkpoint.run.resume_report import read_receipts
from kempnerforge.checkpoint.tools.verify import verify
from kempnerforge.errors import DamagedCheckpointError, RunFolderError, StepNotFoundError

Note = Callable[[str], None]
Progress = Callable[[int, int], None]
"""Told bytes done and bytes in all."""


@dataclass(frozen=True)
class Renamed:
    """What a rollback, or its undoing, did."""

    newest_step: int
    """The step that the next start goes on from."""
    renamed: dict[str, str]
    """Old name -> new name, in ``folder``."""
    folder: str
    wandb_id: str
    """The run in wandb that the next attempt logs to."""
    changed: bool = True
    """False when there was nothing to do."""


def roll_back(run_dir: Path, step: int, *, note: Note, progress: Progress) -> Renamed:
    """Set all steps after ``step`` aside, so that the next start goes on from it.

    Takes the run's lease and the number of an attempt. The decision is written to ``run.json`` before the
    first rename: if the process is killed after that, the next start of the run completes it. ``note`` is
    told when the lease has to be watched. With no later step nothing is changed. Steps of other runs in the
    folder are left as they are.

    ``step`` 0 is the beginning: where it was not committed, all steps are set aside and the next start is a
    fresh one. That is also the way on for a run whose steps are gone for good.

    Raises StepNotFoundError, DamagedCheckpointError, UnreachableCheckpointError, MismatchError,
    LeaseHeldError, RunFolderError.
    """
    record = _record_of(run_dir)
    folder = record.checkpoint_folder(run_dir)
    if step > 0:
        _require_step(folder, step)
    held = lease.acquire(run_dir, after_attempt=lineage.last_attempt(run_dir), note=note)
    try:
        record = _record_of(run_dir)
        folder = record.checkpoint_folder(run_dir)
        mine = claim.require_own(folder, record, run_dir)
        listing = paths.list_folder(folder)
        own = [one for one in listing.steps if not mine.foreign_run(folder / paths.step_name(one))]
        committed = {one for one in paths.committed_steps(folder) if one in own}
        to_start = step == 0 and 0 not in committed
        if not to_start and step not in committed:
            whose = mine.foreign_run(folder / paths.step_name(step))
            raise StepNotFoundError(f"step {step} in {folder} is of another run, {whose}")
        later = [one for one in own if to_start or one > step]
        in_the_way = known_steps.in_the_way(listing, run_dir) if to_start else []
        is_given_up = to_start and (in_the_way or known_steps.newest_known(run_dir) is not None)
        if not later and not is_given_up:
            return Renamed(step, {}, str(folder), record.wandb_id, changed=False)
        if not to_start:
            _check_sound(folder, step, progress)
        targets = {one: lineage.free_name(folder, one, paths.rolled_back_name) for one in later}
        record = _begin_timeline(record, held.attempt, step, [path.name for path in targets.values()])
        record = _cleared(record, [path.name for path in in_the_way])
        metadata.write(run_dir, record)
        # The decision stands from here on: what fails now the next start completes, or passes over.
        renamed = _set_aside(folder, targets, note)
        _point_latest(folder, None if to_start else step, note)
    except OSError as error:
        raise RunFolderError(f"{run_dir} could not be rolled back: {error}") from error
    finally:
        held.release()
    return Renamed(step, renamed, str(folder), record.wandb_id)


def _set_aside(folder: Path, targets: dict[int, Path], note: Note) -> dict[str, str]:
    """Rename the steps. Returns old and new names of those renamed; ``note`` gets a line for each other."""
    renamed = {}
    for step, target in targets.items():
        path = folder / paths.step_name(step)
        try:
            path.rename(target)
        except OSError as error:
            note(
                f"{path} could not be renamed ({error.strerror or error}). It counts as rolled back all the "
                "same: the next start renames it, or passes over it"
            )
        else:
            renamed[path.name] = target.name
    with contextlib.suppress(OSError):  # a rename that a crash undoes is done again by the next start
        _sync(folder)
    return renamed


def undo(run_dir: Path, *, note: Note) -> Renamed:
    """Take the last rollback back. Possible until an attempt has gone on from the older step.

    Raises StepNotFoundError when there is no rollback, RunFolderError when it is too late, LeaseHeldError.
    """
    _record_of(run_dir)
    held = lease.acquire(run_dir, after_attempt=lineage.last_attempt(run_dir), note=note)
    try:
        record = _record_of(run_dir)
        folder = record.checkpoint_folder(run_dir)
        last = _last_rollback(run_dir, record)
        # run.json last: until then the rollback stands, and a next start completes it.
        mine = claim.require_own(folder, record, run_dir)
        renamed = {}
        # Listed, not looked up: a lookup that misses what is there would end its way back for good.
        names = set(os.listdir(folder)) if last.set_aside else set()
        for name in last.set_aside:
            original = name.split(".")[1]
            if name in names and original not in names:
                (folder / name).rename(folder / original)
                renamed[name] = original
        _sync(folder)
        record = replace(
            record,
            attempt=held.attempt,
            rollbacks=record.rollbacks[:-1],
            wandb_id=last.wandb_id,
            wandb_first_attempt=last.wandb_first_attempt,
        )
        metadata.write(run_dir, record)
        newest = owner.newest_step(folder, mine)
        _point_latest(folder, newest, note)
    except OSError as error:
        raise RunFolderError(f"{run_dir}: the rollback could not be undone: {error}") from error
    finally:
        held.release()
    return Renamed(last.step if newest is None else newest, renamed, str(folder), record.wandb_id)


def _point_latest(folder: Path, step: int | None, note: Note) -> None:
    """Point ``latest`` to ``step``; without one, remove it."""
    warning = latest_link.point(folder, step) if step is not None else latest_link.remove(folder)
    if warning:
        note(warning)


def _sync(folder: Path) -> None:
    if folder.is_dir():  # it may be gone with the steps
        fsio.fsync_folder(folder)


def _cleared(record: RunRecord, names: list[str]) -> RunRecord:
    *before, last = record.rollbacks
    return replace(record, rollbacks=(*before, replace(last, cleared=names)))


def _check_sound(folder: Path, step: int, progress: Progress) -> None:
    path = folder / paths.step_name(step)
    found = verify(path, progress=progress)
    if not found.sound:
        others = [str(one) for one in paths.committed_steps(folder) if one != step]
        raise DamagedCheckpointError(
            f"{path.name} is damaged: {found.problems[0]}. Nothing was changed. Other steps of this run: "
            f"{', '.join(others)}. See: kempnerforge ckpt verify {path}"
        )


def _begin_timeline(record: RunRecord, attempt: int, step: int, names: list[str]) -> RunRecord:
    before = Rollback(
        attempt=attempt,
        step=step,
        time=time.time(),
        wandb_id=record.wandb_id,
        wandb_first_attempt=record.wandb_first_attempt,
        set_aside=names,
    )
    return replace(
        record,
        attempt=attempt,
        rollbacks=(*record.rollbacks, before),
        # wandb takes no step below its newest one, so the new timeline needs a run of its own there.
        wandb_id=f"{record.run_id}-rollback{attempt}",
        wandb_first_attempt=attempt,
    )


def _last_rollback(run_dir: Path, record: RunRecord) -> Rollback:
    if not record.rollbacks:
        raise StepNotFoundError(f"{run_dir} has no rollback that could be undone")
    last = record.rollbacks[-1]
    since = [row["attempt"] for row in read_receipts(run_dir) if row["attempt"] > last.attempt]
    if since:
        why = f"attempt {since[0]} has gone on from step {last.step} since, so the rollback cannot be undone"
        if last.set_aside:
            example = record.checkpoint_folder(run_dir) / last.set_aside[0]
            why += (
                ". To go on from a step that it set aside, in a run of its own: "
                f"kempnerforge ckpt fork {example} NEW_RUN"
            )
        raise RunFolderError(why)
    return last


def _record_of(run_dir: Path) -> RunRecord:
    try:
        record = metadata.read(run_dir)
    except OSError as error:
        raise RunFolderError(f"{run_dir / metadata.RUN_FILE} cannot be read: {error}") from error
    if record is None:
        raise RunFolderError(f"{run_dir} is no run's folder: it has no {metadata.RUN_FILE}")
    return record


def _require_step(folder: Path, step: int) -> None:
    steps = paths.committed_steps(folder)
    if step not in steps:
        known = f"its steps: {', '.join(map(str, steps))}" if steps else "it has none"
        raise StepNotFoundError(f"{folder} has no committed step {step}; {known}")
