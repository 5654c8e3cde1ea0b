"""Decide which committed steps are on a run's timeline, and set the others aside.

The timeline of a run consists of the steps that led to its present state. A run that resumes from
step 40, after a kill or a rollback, leaves behind the later steps of older attempts: their rows in
``metrics.jsonl`` no longer count, and neither do their checkpoints. One rule decides both:

    A step of an attempt counts if no later attempt resumed from, or rolled back to, a step below
    it.

The rule depends only on what is on disk: ``receipts.jsonl``, the rollbacks in ``run.json`` and the
attempt in each manifest. So it does not matter when a step appeared. A checkpoint that an attempt
without the lease commits late is found now or at the next start, and so are steps that a killed
rollback did not set aside.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kempnerforge import fsio
from kempnerforge.checkpoint.format import manifest, paths
from kempnerforge.checkpoint.run import metadata
from kempnerforge.checkpoint.run.metadata import Restored
from kempnerforge.checkpoint.run.resume_report import read_receipts
from kempnerforge.errors import DamagedCheckpointError, MismatchError

_SECOND_LOOK_AFTER_S = 0.5
"""A late step must be recognized as one although its manifest is missing for a moment."""


@dataclass(frozen=True)
class ResumePoint:
    """Where ``attempt`` began. Steps above ``step`` of older attempts no longer count."""

    attempt: int
    step: int
    is_rollback: bool = False

    def leaves_behind(self, step: int, attempt: int) -> bool:
        """Return whether this takes ``step`` of ``attempt`` off the timeline."""
        return attempt < self.attempt and step > self.step


def cuts(run_dir: Path) -> list[ResumePoint]:
    """Return where each attempt began, for attempts that got that far. Raises OSError and RunFolderError."""
    record = metadata.read(run_dir)
    rollbacks = record.rollbacks if record is not None else ()
    restored = record.restored if record is not None else ()
    return [
        *(ResumePoint(row["attempt"], _began(row, restored)) for row in read_receipts(run_dir)),
        *(ResumePoint(rollback.attempt, rollback.step, is_rollback=True) for rollback in rollbacks),
    ]


def _began(receipt: Mapping[str, Any], restored: Sequence[Restored]) -> int:
    """Return the step above which older attempts' steps no longer count: at least a restored step."""
    raised = [back.step for back in restored if back.since <= receipt["attempt"] <= back.attempt]
    return max([receipt["step"], *raised])


def rollbacks(run_dir: Path) -> list[tuple[int, int]]:
    """Return attempt and step of the run's rollbacks. Raises OSError and RunFolderError."""
    record = metadata.read(run_dir)
    return [(rollback.attempt, rollback.step) for rollback in record.rollbacks] if record is not None else []


def last_attempt(run_dir: Path) -> int:
    """Return the highest attempt number in ``run.json`` and ``receipts.jsonl``; 0 for a run never started.

    A new attempt's number must be higher, even if ``run.json`` was created again: with a number
    that older receipts have, its checkpoints would be off the timeline. Raises OSError and
    RunFolderError.
    """
    record = metadata.read(run_dir)
    counted = record.attempt if record is not None else 0
    return max([counted, *(cut.attempt for cut in cuts(run_dir))])


def late_arrivals(committed: dict[int, int], found: Sequence[ResumePoint]) -> dict[int, ResumePoint]:
    """Return the committed steps that are off the timeline -> the resume point that excludes them.

    A pure function. ``committed``: step -> attempt that committed it. If both a rollback and a
    resume exclude a step, the rollback is returned.
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
    """Return the steps that ``newest`` descends from, including itself. A pure function.

    An attempt resumes from one step, so all steps that it committed up to ``newest`` are ancestors.
    So are those of the attempt that committed the step it resumed from, up to that step, and so on.

    Args:
        newest: a step in ``committed``.
        committed: step -> attempt, for the steps in the folder.
        parents: step -> the parent step in its manifest.
        found: resume points from receipts, for steps that were deleted since.
        commits: step and attempt of the commits in the ledger, for the same reason.
    """
    starts = [(cut.attempt, cut.step) for cut in found if not cut.is_rollback]
    with_receipt = {attempt for attempt, _ in starts}
    starts += [
        (committed[step], parent)
        for step, parent in parents.items()
        if parent is not None and committed[step] not in with_receipt
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
        line |= {number for number, by in committed.items() if by == attempt and first <= number <= step}
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
    """Rename steps that are off the timeline, so that no resume chooses them. Never deletes.

    First rank only. Reads the manifests of all steps except the ``trusted`` ones. Damaged steps are
    left to the resume. So are steps with another run's id, whose attempts are numbered differently.

    An ancestor of the newest step on the timeline is kept, even if an attempt began below it
    meanwhile, with another ``checkpoint.dir`` for example (see ``ancestors``). With ``at_start``,
    if no step would be left, only rollbacks set steps aside.

    Args:
        folder: the checkpoint folder.
        found: where each attempt began.
        run_id: the run.
        parent: run id and step that a fork began with. Only a rollback leaves it behind.
        trusted: steps known to be on the timeline.
        commits: returns step and attempt of the commits in the ledger.
        at_start: whether this is before a resume.
        failed: called for steps that cannot be renamed, with step, naming function, and error.
        unread: called for steps whose manifest cannot be read.

    Returns the new paths. Durable on return. Raises OSError, except errors that ``failed`` and
    ``unread`` receive.
    """
    if not found:
        return []
    lowest = min(cut.step for cut in found)
    settled, others = [], []
    for step in paths.list_folder(folder).steps:
        (settled if step <= lowest or step in trusted else others).append(step)
    members = _read_members(folder, others, run_id, parent, unread)
    committed = members.committed
    late = late_arrivals(committed, found)
    late = {step: cut for step, cut in late.items() if committed[step] > 0 or cut.is_rollback}
    living = committed.keys() - late.keys()
    if late and living and any(not cut.is_rollback for cut in late.values()):
        kept = ancestors(max(living), committed, members.parents, found, commits())
        late = {step: cut for step, cut in late.items() if step not in kept}
    if at_start and not settled and not members.unnamed and len(late) == len(committed):
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


@dataclass
class _Members:
    """Steps in a checkpoint folder that may be off the timeline."""

    committed: dict[int, int] = field(default_factory=dict)
    """This run's steps -> attempt; 0 for the step that a fork began with."""
    parents: dict[int, int | None] = field(default_factory=dict)
    """Step -> the parent step in its manifest."""
    unnamed: bool = False
    """Whether there are steps of early versions, whose manifests name no run."""


def _read_members(
    folder: Path,
    steps: Iterable[int],
    run_id: str,
    parent: tuple[str, int | None],
    unread: Callable[[int, OSError], None] | None,
) -> _Members:
    members = _Members()
    for step in steps:
        try:
            read = functools.partial(manifest.read, folder / paths.step_name(step))
            provenance = manifest.confirm_damage(read, pause_s=_SECOND_LOOK_AFTER_S).provenance
        except (DamagedCheckpointError, MismatchError):
            continue
        except OSError as error:
            if unread is None:
                raise
            unread(step, error)
            continue
        if provenance.run_id == run_id:
            members.committed[step] = provenance.attempt
            members.parents[step] = provenance.parent_step
        elif parent == (provenance.run_id, provenance.step):
            members.committed[step] = 0
        members.unnamed |= not provenance.run_id
    return members


def set_aside(folder: Path, step: int, name: Callable[[int, int], str]) -> Path:
    """Rename a step to the first free ``name(step, number)``. Durable on return. Return the new path.

    Raises OSError if the step still has its name. A rename that cannot be synced is no error: if a
    crash undoes it, the next start sets the step aside again.
    """
    path, target = folder / paths.step_name(step), free_name(folder, step, name)
    try:
        path.rename(target)
    except OSError:
        if os.path.lexists(path) or not os.path.lexists(target):
            raise
        # The rename succeeded in spite of the error, as can happen on network file systems.
    with contextlib.suppress(OSError):
        fsio.fsync_folder(folder)
    return target


def free_name(folder: Path, step: int, name: Callable[[int, int], str]) -> Path:
    """Return the first unused path ``name(step, number)`` in ``folder``."""
    number = 1
    while (folder / name(step, number)).exists():
        number += 1
    return folder / name(step, number)
