"""Which committed steps belong to a run's present timeline, and what becomes of the others.

A run that goes on from step 40, after a kill or a rollback, leaves behind what older attempts did beyond it:
their rows in ``metrics.jsonl`` no longer count, and neither do their checkpoints. The same rule serves both:

    a step of an attempt counts if no later attempt went on from, or back to, a step below it.

It is judged from what is on disk: ``receipts.jsonl``, the rollbacks in ``run.json`` and the attempt in each
manifest. So it does not matter when a step appeared. A checkpoint that an attempt without the lease commits
late is found now or at the next start, and so is what a rollback that was killed had still to set aside.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kempnerforge import fsio
from kempnerforge.checkpoint.format import manifest, paths
from kempnerforge.checkpoint.run import metadata
from kempnerforge.checkpoint.run.metadata import Restored
from kempnerforge.checkpoint.run.resume_report import last_logged_step, read_receipts
from kempnerforge.errors import DamagedCheckpointError, MismatchError
from kempnerforge.goodput.event_log import Event
from kempnerforge.goodput.history import derive, last_step_done


@dataclass(frozen=True)
class ResumePoint:
    """Where ``attempt`` began: what older attempts did above ``step`` does not count any more."""

    attempt: int
    step: int
    is_rollback: bool = False

    def leaves_behind(self, step: int, attempt: int) -> bool:
        """Whether this cut takes ``step`` of ``attempt`` off the timeline."""
        return attempt < self.attempt and step > self.step


def cuts(run_dir: Path) -> list[ResumePoint]:
    """Where each attempt of the run began, as far as it got that far. Raises OSError and RunFolderError."""
    record = metadata.read(run_dir)
    rollbacks = record.rollbacks if record is not None else ()
    restored = record.restored if record is not None else ()
    return [
        *(ResumePoint(row["attempt"], _began(row, restored)) for row in read_receipts(run_dir)),
        *(ResumePoint(rollback.attempt, rollback.step, is_rollback=True) for rollback in rollbacks),
    ]


def _began(receipt: Mapping[str, Any], restored: Sequence[Restored]) -> int:
    """The step above which an attempt leaves older ones behind: not below a suspect step that came back."""
    raised = [one.step for one in restored if one.since <= receipt["attempt"] <= one.attempt]
    return max([receipt["step"], *raised])


def rollbacks(run_dir: Path) -> list[int]:
    """The attempt numbers of the run's rollbacks. Raises OSError and RunFolderError."""
    record = metadata.read(run_dir)
    return [rollback.attempt for rollback in record.rollbacks] if record is not None else []


def last_attempt(run_dir: Path) -> int:
    """The highest attempt number in ``run.json`` and ``receipts.jsonl``; 0 for a run that was never started.

    A new attempt's number is above it even where ``run.json`` was made anew: with a number that older
    receipts have, its checkpoints would be off the timeline. Raises OSError and RunFolderError.
    """
    record = metadata.read(run_dir)
    counted = record.attempt if record is not None else 0
    return max([counted, *(cut.attempt for cut in cuts(run_dir))])


def last_done_step(run_dir: Path, events: Sequence[Event]) -> int:
    """Return the last step that an earlier attempt is known to have done, as far as it counts.

    After an attempt of a user's own loop the ledger knows it; after one of the harness ``metrics.jsonl``
    does, row by row. Raises OSError and RunFolderError.
    """
    record = metadata.read(run_dir)
    found = [(one.attempt, one.step) for one in record.rollbacks] if record is not None else []
    history = derive(events, ())
    newest = next((one for one in reversed(history) if one.resume is not None), None)
    if newest is not None and newest.is_own_loop:
        return last_step_done(history, found)
    return last_logged_step(run_dir)


def late_arrivals(committed: dict[int, int], found: Sequence[ResumePoint]) -> dict[int, ResumePoint]:
    """Of committed steps, given with the attempt that made each: those left behind, with what left them.

    Pure. A rollback is named before a resume.
    """
    left = {}
    for step, attempt in committed.items():
        by = [cut for cut in found if cut.leaves_behind(step, attempt)]
        if by:
            left[step] = max(by, key=lambda cut: cut.is_rollback)
    return left


def ancestors(
    newest: int,
    committed: Mapping[int, int],
    parents: Mapping[int, int | None],
    found: Sequence[ResumePoint],
    commits: Iterable[tuple[int, int]],
) -> set[int]:
    """The steps that ``newest`` comes from. Pure.

    An attempt goes on from one step, so all that it committed up to ``newest`` is of one line, and before it
    comes the line of the attempt that committed that step. ``committed`` has the attempt of each step in the
    folder, ``parents`` what the manifests name. Where a step was deleted since, receipts (``found``) and the
    ledger (``commits``) tell the same.
    """
    starts = [(cut.attempt, cut.step) for cut in found if not cut.is_rollback]
    told = {attempt for attempt, _ in starts}
    starts += [
        (committed[step], parent)
        for step, parent in parents.items()
        if parent is not None and committed[step] not in told
    ]
    began: dict[int, int] = {}
    for attempt, step in starts:
        began[attempt] = min(step, began.get(attempt, step))
    makers: dict[int, set[int]] = {step: {attempt} for step, attempt in committed.items()}
    for step, attempt in commits:
        makers.setdefault(step, set()).add(attempt)
    line: set[int] = set()
    step, attempt = newest, committed[newest]
    while True:
        first = began.get(attempt, 0)
        line |= {one for one, by in committed.items() if by == attempt and first <= one <= step}
        older = [by for by in makers.get(first, ()) if by < attempt]
        if not older:
            return line
        step, attempt = first, max(older)


def set_aside_late(
    folder: Path,
    found: Sequence[ResumePoint],
    *,
    run_id: str,
    parent: tuple[str, int | None] = ("", None),
    trusted: Collection[int] = (),
    commits: Callable[[], Iterable[tuple[int, int]]] = tuple,
    at_start: bool = False,
    failed: Callable[[int, Callable[[int, int], str], OSError], None] | None = None,
    unread: Callable[[int, OSError], None] | None = None,
) -> list[Path]:
    """Give the steps in ``folder`` that are off the timeline a name that no resume chooses. Never deletes.

    Rank 0 only. Reads the manifests of all steps but the ``trusted`` ones; a damaged one is left for the
    resume to judge, and so is one of another run's id, whose attempts are counted differently. ``parent``,
    run id and step, is what a fork began with: only a rollback leaves that behind.

    A step that the newest living one comes from stays, whatever began below it in the meantime, with another
    ``checkpoint.dir`` perhaps (``ancestors``; ``commits`` gives step and attempt of the commits in the
    ledger). ``at_start``, before a resume, no resume leaves anything behind when no step would be left.

    Returns the new paths. Durable on return. Raises OSError, unless ``failed`` takes what cannot be renamed
    (step, naming function, error) and ``unread`` the steps whose manifest cannot be read.
    """
    if not found:
        return []
    lowest = min(cut.step for cut in found)
    steps = paths.list_folder(folder).steps
    committed: dict[int, int] = {}
    parents: dict[int, int | None] = {}
    stays = False
    for step in steps:
        if step <= lowest or step in trusted:
            stays = True
            continue
        try:
            provenance = manifest.read(folder / paths.step_name(step)).provenance
        except (DamagedCheckpointError, MismatchError):
            continue
        except OSError as error:
            if unread is None:
                raise
            unread(step, error)
            continue
        if provenance.run_id == run_id:
            committed[step], parents[step] = provenance.attempt, provenance.parent_step
        elif parent == (provenance.run_id, provenance.step):
            committed[step] = 0
        stays |= not provenance.run_id
    late = late_arrivals(committed, found)
    late = {step: cut for step, cut in late.items() if committed[step] > 0 or cut.is_rollback}
    living = committed.keys() - late.keys()
    if late and living and any(not cut.is_rollback for cut in late.values()):
        kept = ancestors(max(living), committed, parents, found, commits())
        late = {step: cut for step, cut in late.items() if step not in kept}
    if at_start and not stays and len(late) == len(committed):
        late = {step: cut for step, cut in late.items() if cut.is_rollback}
    moved = []
    for step, cut in late.items():
        name = paths.rolled_back_name if cut.is_rollback else paths.late_name
        try:
            moved.append(set_aside(folder, step, name))
        except OSError as error:
            if failed is None:
                raise
            failed(step, name, error)
    return moved


def set_aside(folder: Path, step: int, name: Callable[[int, int], str]) -> Path:
    """Rename a step to the first free ``name(step, number)``. Durable on return. Returns the new path.

    Raises OSError when the step still has its name. A rename that cannot be synced stands all the same: a
    crash that undoes it brings back a step that the next start judges again.
    """
    path, target = folder / paths.step_name(step), free_name(folder, step, name)
    try:
        path.rename(target)
    except OSError:
        if os.path.lexists(path) or not os.path.lexists(target):
            raise
        # It was done all the same, as network file systems have it.
    with contextlib.suppress(OSError):
        fsio.fsync_folder(folder)
    return target


def free_name(folder: Path, step: int, name: Callable[[int, int], str]) -> Path:
    """The first path ``name(step, number)`` in ``folder`` that nothing has."""
    number = 1
    while (folder / name(step, number)).exists():
        number += 1
    return folder / name(step, number)
