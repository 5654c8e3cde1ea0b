"""Roll back a run to an older step, or undo a rollback. Later steps are renamed, and none is deleted."""

from __future__ import annotations

import contextlib
import logging
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

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with the bytes done so far, and the total."""


@dataclass(frozen=True)
class Renamed:
    """Result of a rollback, or of undoing one."""

    newest_step: int
    """The step that the next start resumes from."""
    renamed: dict[str, str]
    """Old name -> new name, in ``folder``."""
    folder: str
    timeline_id: str
    """The timeline that the next attempt belongs to."""
    changed: bool = True
    """False if there was nothing to do."""


def roll_back(run_dir: Path, step: int, *, progress: Progress) -> Renamed:
    """Set all steps after ``step`` aside, so that the next start resumes from it.

    Takes the run's lease and an attempt number. The decision is written to ``run.json`` before the
    first rename: if the process is killed after that, the next start completes the rollback.
    Without later steps, nothing changes. Steps of other runs in the folder are left as they are.

    ``step`` 0 is the beginning of the run. If it was not committed, all steps are set aside, and
    the next start begins at step 0. Use it also for a run whose steps are lost for good.

    Raises StepNotFoundError, DamagedCheckpointError, UnreachableCheckpointError, MismatchError,
    LeaseHeldError, RunFolderError.
    """
    record = _record_of(run_dir)
    folder = record.checkpoint_folder(run_dir)
    if step > 0:
        _require_step(folder, step)
    held = lease.acquire(run_dir, after_attempt=lineage.last_attempt(run_dir))
    try:
        record = _record_of(run_dir)
        folder = record.checkpoint_folder(run_dir)
        mine = claim.require_own(folder, record, run_dir)
        listing = paths.list_folder(folder)
        own = [number for number in listing.steps if not mine.foreign_run(folder / paths.step_name(number))]
        committed = set(own).intersection(paths.committed_steps(folder))
        to_start = step == 0 and 0 not in committed
        if not to_start and step not in committed:
            whose = mine.foreign_run(folder / paths.step_name(step))
            raise StepNotFoundError(f"step {step} in {folder} belongs to another run, {whose}")
        later = [number for number in own if to_start or number > step]
        in_the_way = known_steps.in_the_way(listing, run_dir) if to_start else []
        is_given_up = to_start and (in_the_way or known_steps.newest_known(run_dir) is not None)
        if not later and not is_given_up:
            return Renamed(step, {}, str(folder), record.timeline_id, changed=False)
        if not to_start:
            _check_sound(folder, step, progress)
        targets = {number: lineage.free_name(folder, number, paths.rolled_back_name) for number in later}
        record = _begin_timeline(record, held.attempt, step, [path.name for path in targets.values()])
        record = _cleared(record, [path.name for path in in_the_way])
        metadata.write(run_dir, record)
        # The decision is final now. The next start completes renames that fail here, or skips the steps.
        renamed = _set_aside(folder, targets)
        _point_latest(folder, None if to_start else step)
    except OSError as error:
        raise RunFolderError(f"{run_dir} could not be rolled back: {error}") from error
    finally:
        held.release()
    return Renamed(step, renamed, str(folder), record.timeline_id)


def _set_aside(folder: Path, targets: dict[int, Path]) -> dict[str, str]:
    """Rename the steps. Return old and new names of those renamed. Log each failure."""
    renamed = {}
    for step, target in targets.items():
        path = folder / paths.step_name(step)
        try:
            path.rename(target)
        except OSError as error:
            log.warning(
                f"{path} could not be renamed ({error.strerror or error}). It still counts as rolled back: "
                "the next start renames it, or skips it"
            )
        else:
            renamed[path.name] = target.name
    with contextlib.suppress(OSError):  # the next start repeats a rename that a crash undoes
        _sync(folder)
    return renamed


def undo(run_dir: Path) -> Renamed:
    """Undo the last rollback. This is possible until an attempt has resumed from the older step.

    Raises StepNotFoundError if there is no rollback, RunFolderError if it is too late,
    LeaseHeldError.
    """
    _record_of(run_dir)
    held = lease.acquire(run_dir, after_attempt=lineage.last_attempt(run_dir))
    try:
        record = _record_of(run_dir)
        folder = record.checkpoint_folder(run_dir)
        last = _last_rollback(run_dir, record)
        # Write run.json last: until then the rollback is in effect, and the next start would complete it.
        mine = claim.require_own(folder, record, run_dir)
        renamed = {}
        # List the folder once: a stale lookup that misses a step would make it unrecoverable.
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
            timeline_id=last.timeline_id,
            timeline_first_attempt=last.timeline_first_attempt,
        )
        metadata.write(run_dir, record)
        newest = owner.newest_step(folder, mine)
        _point_latest(folder, newest)
    except OSError as error:
        raise RunFolderError(f"{run_dir}: the rollback could not be undone: {error}") from error
    finally:
        held.release()
    return Renamed(last.step if newest is None else newest, renamed, str(folder), record.timeline_id)


def _point_latest(folder: Path, step: int | None) -> None:
    """Point ``latest`` at ``step``; without one, remove it."""
    warning = latest_link.point(folder, step) if step is not None else latest_link.remove(folder)
    if warning:
        log.warning(warning)


def _sync(folder: Path) -> None:
    if folder.is_dir():  # for a run whose steps are lost, the folder may be missing too
        fsio.fsync_folder(folder)


def _cleared(record: RunRecord, names: list[str]) -> RunRecord:
    *before, last = record.rollbacks
    return replace(record, rollbacks=(*before, replace(last, cleared=names)))


def _check_sound(folder: Path, step: int, progress: Progress) -> None:
    path = folder / paths.step_name(step)
    found = verify(path, progress=progress)
    if not found.sound:
        others = [str(number) for number in paths.committed_steps(folder) if number != step]
        raise DamagedCheckpointError(
            f"{path.name} is damaged: {found.problems[0]}. Nothing was changed. Other steps of this run: "
            f"{', '.join(others)}. See: kempnerforge ckpt verify {path}"
        )


def _begin_timeline(record: RunRecord, attempt: int, step: int, names: list[str]) -> RunRecord:
    before = Rollback(
        attempt=attempt,
        step=step,
        time=time.time(),
        timeline_id=record.timeline_id,
        timeline_first_attempt=record.timeline_first_attempt,
        set_aside=names,
    )
    return replace(
        record,
        attempt=attempt,
        rollbacks=(*record.rollbacks, before),
        # The steps of the new timeline may differ from the old ones. Their metrics go by another id.
        timeline_id=f"{record.run_id}-rollback{attempt}",
        timeline_first_attempt=attempt,
    )


def _last_rollback(run_dir: Path, record: RunRecord) -> Rollback:
    if not record.rollbacks:
        raise StepNotFoundError(f"{run_dir} has no rollback to undo")
    last = record.rollbacks[-1]
    since = [row["attempt"] for row in read_receipts(run_dir) if row["attempt"] > last.attempt]
    if since:
        why = f"attempt {since[0]} has since resumed from step {last.step}, so the rollback cannot be undone"
        if last.set_aside:
            example = record.checkpoint_folder(run_dir) / last.set_aside[0]
            why += (
                ". To start a new run from a step that it set aside: "
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
        raise RunFolderError(f"{run_dir} is not a run's folder: it has no {metadata.RUN_FILE}")
    return record


def _require_step(folder: Path, step: int) -> None:
    steps = paths.committed_steps(folder)
    if step not in steps:
        known = f"its steps: {', '.join(map(str, steps))}" if steps else "it has none"
        raise StepNotFoundError(f"{folder} has no committed step {step}; {known}")
