"""Find in a run's records whether it has committed steps, and which it gave up by a rollback to step 0.

A checkpoint folder without steps has two possible causes: the run has committed nothing yet, or
this is not the folder that it used before (not mounted, purged, or another one).
``receipts.jsonl``, ``ledger.jsonl`` and ``run.json`` are stored elsewhere, and distinguish the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kempnerforge.checkpoint.format import manifest, paths
from kempnerforge.checkpoint.format.paths import FolderListing
from kempnerforge.checkpoint.run import lineage, metadata
from kempnerforge.checkpoint.run.metadata import Parent, Rollback
from kempnerforge.checkpoint.run.owner import Owner
from kempnerforge.checkpoint.run.resume_report import read_receipts
from kempnerforge.errors import DamagedCheckpointError, MismatchError, StepsMissingError
from kempnerforge.goodput.event_log import Event
from kempnerforge.goodput.run_history import RunHistory


@dataclass(frozen=True)
class KnownStep:
    """A committed step of the current timeline."""

    step: int
    attempt: int
    """The attempt that committed it or resumed from it; 0 for the first step of a fork."""


def commits(events: Sequence[Event]) -> list[KnownStep]:
    """Return the commits among the events of a ledger."""
    return [KnownStep(event["step"], event["attempt"]) for event in events if event["event"] == "commit"]


def newest_known(run_dir: Path, history: RunHistory | None = None) -> KnownStep | None:
    """Return the newest committed step of the current timeline, by the run's records; None without one.

    ``history``: that of the run, if the caller has it. Raises OSError and RunFolderError.
    """
    record = metadata.read(run_dir)
    found = commits((history or RunHistory(run_dir)).events())
    found += [
        KnownStep(row["step"], row["attempt"])
        for row in read_receipts(run_dir)
        if row.get("source") == "resume"
    ]
    if record is not None and record.parent is not None:
        found.append(KnownStep(record.parent.step, 0))
    cuts = lineage.cuts(run_dir)
    begun_again = max((cut.attempt for cut in cuts if cut.is_rollback and cut.step == 0), default=0)
    living = [
        known
        for known in found
        if not any(cut.leaves_behind(known.step, known.attempt) for cut in cuts)
        # After a rollback to step 0, a missing step 0 is not a loss.
        and not (known.step == 0 and known.attempt < begun_again)
    ]
    return max(living, key=lambda known: (known.step, known.attempt), default=None)


def require_known(
    folder: Path,
    run_dir: Path,
    mine: Owner,
    *,
    was_in: Path | None = None,
    history: RunHistory | None = None,
) -> None:
    """Raise StepsMissingError if ``folder`` has no step although the run has committed some. Changes nothing.

    Does not raise for a folder with steps that were set aside: the resume reports them. Steps that
    the run gave up by a rollback to step 0 do not count. ``was_in``: where the run's checkpoints
    were at its last start. ``history``: as for ``newest_known``. Also raises OSError and
    RunFolderError.
    """
    listing = paths.list_folder(folder)
    if in_the_way(listing, run_dir):
        return
    if any(mine.may_own(folder / paths.step_name(step)) for step in listing.steps):
        return
    known = newest_known(run_dir, history)
    if known is None:
        return
    what = f"step {known.step} was committed (attempt {known.attempt})"
    if known.attempt == 0:
        what = f"it starts at step {known.step} of the run that it was forked from"
    changed = "checkpoint.dir has changed"
    if was_in is not None and was_in.absolute() != folder.absolute():
        changed += f": the steps were in {was_in}"
    has = "has no step of this run" if folder.exists() else "does not exist"
    raise StepsMissingError(
        f"{folder} {has}, but by the records in {run_dir} {what}. Its file system is not mounted, the steps "
        f"were purged, or {changed}. Nothing was changed. Restore the steps and run the same command "
        f"again. To restart at step 0: kempnerforge ckpt rollback {run_dir} 0"
    )


def set_aside(listing: FolderListing) -> list[Path]:
    """Return the folders of all steps that were set aside."""
    return [*listing.quarantined, *listing.rolled_back, *listing.late, *listing.suspect]


def in_the_way(listing: FolderListing, run_dir: Path | None) -> list[Path]:
    """Return the set-aside folders that keep the run from starting at step 0.

    These are all except those that the run gave up by a rollback to step 0. Without ``run_dir``,
    these are all of them. Raises OSError and RunFolderError.
    """
    record = metadata.read(run_dir) if run_dir is not None else None
    found = [rollback for rollback in record.rollbacks if rollback.step == 0] if record is not None else []
    if record is None or not found:
        return set_aside(listing)
    return [path for path in set_aside(listing) if not _is_given_up(path, found, record.parent)]


def _is_given_up(path: Path, found: list[Rollback], parent: Parent | None) -> bool:
    if any(path.name in (*rollback.set_aside, *rollback.cleared) for rollback in found):
        return True
    try:
        provenance = manifest.read(path).provenance
    except (DamagedCheckpointError, MismatchError, OSError):
        return False
    is_parent = parent is not None and (parent.run_id, parent.step) == (provenance.run_id, provenance.step)
    return is_parent or provenance.attempt < found[-1].attempt
