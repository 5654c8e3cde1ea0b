"""Which committed steps belong to a run's present timeline, and what becomes of the others.

A run that goes on from step 40, after a kill or a rollback, leaves behind what older attempts did beyond it:
their rows in ``metrics.jsonl`` no longer count, and neither do their checkpoints. The same rule serves both:

    a step of an attempt counts if no later attempt went on from, or back to, a step below it.

It is judged from what is on disk: ``receipts.jsonl``, the rollbacks in ``run.json`` and the attempt in each
manifest. So it does not matter when a step appeared. A checkpoint that an attempt without the lease commits
late is found now or at the next start, and so is what a rollback that was killed had still to set aside.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kempnerforge import fsio
from kempnerforge.checkpoint import layout, manifest, run_record
from kempnerforge.checkpoint.receipt import last_logged_step, read_receipts
from kempnerforge.checkpoint.run_record import Restored
from kempnerforge.errors import DamagedCheckpointError, MismatchError
from kempnerforge.goodput.history import last_step_done, read_history


@dataclass(frozen=True)
class Cut:
    """Where ``attempt`` began: what older attempts did above ``step`` does not count any more."""

    attempt: int
    step: int
    is_rollback: bool = False

    def leaves_behind(self, step: int, attempt: int) -> bool:
        """Whether this cut takes ``step`` of ``attempt`` off the timeline."""
        return attempt < self.attempt and step > self.step


def cuts(run_dir: Path) -> list[Cut]:
    """Where each attempt of the run began, as far as it got that far. Raises OSError and RunFolderError."""
    record = run_record.read(run_dir)
    rollbacks = record.rollbacks if record is not None else ()
    restored = record.restored if record is not None else ()
    return [
        *(Cut(row["attempt"], _began(row, restored)) for row in read_receipts(run_dir)),
        *(Cut(rollback.attempt, rollback.step, is_rollback=True) for rollback in rollbacks),
    ]


def _began(receipt: Mapping[str, Any], restored: Sequence[Restored]) -> int:
    """The step above which an attempt leaves older ones behind: not below a suspect step that came back."""
    raised = [one.step for one in restored if one.since <= receipt["attempt"] <= one.attempt]
    return max([receipt["step"], *raised])


def rollbacks(run_dir: Path) -> list[int]:
    """The attempt numbers of the run's rollbacks. Raises OSError and RunFolderError."""
    record = run_record.read(run_dir)
    return [rollback.attempt for rollback in record.rollbacks] if record is not None else []


def last_attempt(run_dir: Path) -> int:
    """The highest attempt number in ``run.json`` and ``receipts.jsonl``; 0 for a run that was never started.

    A new attempt's number is above it even where ``run.json`` was made anew: with a number that older
    receipts have, its checkpoints would be off the timeline. Raises OSError and RunFolderError.
    """
    record = run_record.read(run_dir)
    counted = record.attempt if record is not None else 0
    return max([counted, *(cut.attempt for cut in cuts(run_dir))])


def last_done_step(run_dir: Path) -> int:
    """Return the last step that an earlier attempt is known to have done, as far as it counts.

    After an attempt of a user's own loop the ledger knows it; after one of the harness ``metrics.jsonl``
    does, row by row. Raises OSError and RunFolderError.
    """
    record = run_record.read(run_dir)
    found = [(one.attempt, one.step) for one in record.rollbacks] if record is not None else []
    history = read_history(run_dir)
    newest = next((one for one in reversed(history) if one.resume is not None), None)
    if newest is not None and newest.is_own_loop:
        return last_step_done(history, found)
    return last_logged_step(run_dir)


def late_arrivals(committed: dict[int, int], found: Sequence[Cut]) -> dict[int, Cut]:
    """Of committed steps, given with the attempt that made each: those left behind, with what left them.

    Pure. A rollback is named before a resume.
    """
    left = {}
    for step, attempt in committed.items():
        by = [cut for cut in found if cut.leaves_behind(step, attempt)]
        if by:
            left[step] = max(by, key=lambda cut: cut.is_rollback)
    return left


def set_aside_late(
    folder: Path,
    found: Sequence[Cut],
    *,
    run_id: str,
    trusted: Collection[int] = (),
    at_start: bool = False,
) -> list[Path]:
    """Give the steps in ``folder`` that are off the timeline a name that no resume chooses. Never deletes.

    Rank 0 only. Reads the manifests of all steps but the ``trusted`` ones; a damaged one is left for the
    resume to judge, and so is one of another run's id, whose attempts are counted differently.

    ``at_start``, before a resume, nothing is set aside when no step would be left: an attempt that began at 0
    and committed nothing, perhaps with another ``checkpoint.dir``, must not cost the run what it has.

    Returns the new paths. Durable on return. Raises OSError.
    """
    if not found:
        return []
    lowest = min(cut.step for cut in found)
    steps = layout.list_folder(folder).steps
    committed = {}
    for step in steps:
        if step <= lowest or step in trusted:
            continue
        try:
            provenance = manifest.read(folder / layout.step_name(step)).provenance
        except (DamagedCheckpointError, MismatchError):
            continue
        if provenance.run_id == run_id:
            committed[step] = provenance.attempt
    late = late_arrivals(committed, found)
    if at_start and len(late) == len(steps):
        return []
    return [
        set_aside(folder, step, layout.rolled_back_name if cut.is_rollback else layout.late_name)
        for step, cut in late.items()
    ]


def set_aside(folder: Path, step: int, name: Callable[[int, int], str]) -> Path:
    """Rename a step to the first free ``name(step, number)``. Durable on return. Returns the new path."""
    target = free_name(folder, step, name)
    (folder / layout.step_name(step)).rename(target)
    fsio.fsync_folder(folder)
    return target


def free_name(folder: Path, step: int, name: Callable[[int, int], str]) -> Path:
    """The first path ``name(step, number)`` in ``folder`` that nothing has."""
    number = 1
    while (folder / name(step, number)).exists():
        number += 1
    return folder / name(step, number)


def fence(folder: Path, attempt: int) -> list[Path]:
    """Rename the checkpoints in flight of all older attempts, so that none of them can be committed any more.

    A process that has lost its lease renames its hidden folder to commit it; that fails from here on. Rank 0
    only, after a takeover, before steps are listed. The folders are to be deleted; returns their new paths.
    Durable on return. Raises OSError.
    """
    fenced = []
    for path, owner in layout.list_folder(folder).temporary:
        if owner < attempt:
            target = path.with_name(layout.fenced_name(path.name, attempt))
            fsio.delete_tree(target)
            path.rename(target)
            fenced.append(target)
    if fenced:
        fsio.fsync_folder(folder)
    return fenced
