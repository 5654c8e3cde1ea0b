"""Whether a run has committed steps by its own records, and what it gave up when it went back to step 0.

A checkpoint folder without any step means one of two things: that the run has committed nothing yet, or that
the folder is not the one that it was: not mounted, purged, another one. ``receipts.jsonl``, ``ledger.jsonl``
and ``run.json`` lie elsewhere and tell these apart.
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
from kempnerforge.goodput.event_log import Event, read_events


@dataclass(frozen=True)
class KnownStep:
    """A step of the present timeline that was committed."""

    step: int
    attempt: int
    """That committed it or resumed from it; 0 for the step that a fork began with."""


def commits(events: Sequence[Event]) -> list[KnownStep]:
    """Return the commits among the events of a ledger."""
    return [KnownStep(event["step"], event["attempt"]) for event in events if event["event"] == "commit"]


def newest_known(run_dir: Path) -> KnownStep | None:
    """The newest step of the present timeline that the run's records say was committed; None without one.

    Raises OSError and RunFolderError.
    """
    record = metadata.read(run_dir)
    found = commits(read_events(run_dir))
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
        one
        for one in found
        if not any(cut.leaves_behind(one.step, one.attempt) for cut in cuts)
        # Of a run that goes back to the beginning, a step 0 that is gone is no loss.
        and not (one.step == 0 and one.attempt < begun_again)
    ]
    return max(living, key=lambda one: (one.step, one.attempt), default=None)


def require_known(folder: Path, run_dir: Path, mine: Owner, *, was_in: Path | None = None) -> None:
    """Raise StepsMissingError when ``folder`` has no step of a run that has committed some. Changes nothing.

    A folder in which steps were set aside is left to the resume, which names them, but for those that the run
    gave up when it went back to step 0. ``was_in``: where the
    run's checkpoints were at its last start. Raises OSError and RunFolderError too.
    """
    listing = paths.list_folder(folder)
    if in_the_way(listing, run_dir):
        return
    if any(not mine.foreign_run(folder / paths.step_name(step)) for step in listing.steps):
        return
    known = newest_known(run_dir)
    if known is None:
        return
    what = f"step {known.step} was committed (attempt {known.attempt})"
    if known.attempt == 0:
        what = f"it begins at step {known.step} of the run that it was forked from"
    changed = "checkpoint.dir has changed"
    if was_in is not None and was_in.absolute() != folder.absolute():
        changed += f": the steps were in {was_in}"
    has = "has no step of this run" if folder.exists() else "does not exist"
    raise StepsMissingError(
        f"{folder} {has}, but by the records in {run_dir} {what}. Its file system is not mounted, the steps "
        f"were purged, or {changed}. Nothing was changed. Bring the steps back and start the same command "
        f"again. To begin again at step 0 on purpose: kempnerforge ckpt rollback {run_dir} 0"
    )


def set_aside(listing: FolderListing) -> list[Path]:
    """The folders of steps that were set aside, for whatever reason."""
    return [*listing.quarantined, *listing.rolled_back, *listing.late, *listing.suspect]


def in_the_way(listing: FolderListing, run_dir: Path | None) -> list[Path]:
    """Of the folders that were set aside, those that keep the run from beginning at step 0.

    All of them, but those that were given up when the run went back to step 0. Raises OSError and
    RunFolderError.
    """
    record = metadata.read(run_dir) if run_dir is not None else None
    found = [one for one in record.rollbacks if one.step == 0] if record is not None else []
    if record is None or not found:
        return set_aside(listing)
    return [path for path in set_aside(listing) if not _is_given_up(path, found, record.parent)]


def _is_given_up(path: Path, found: list[Rollback], parent: Parent | None) -> bool:
    if any(path.name in (*one.set_aside, *one.cleared) for one in found):
        return True
    try:
        provenance = manifest.read(path).provenance
    except (DamagedCheckpointError, MismatchError, OSError):
        return False
    is_parent = parent is not None and (parent.run_id, parent.step) == (provenance.run_id, provenance.step)
    return is_parent or provenance.attempt < found[-1].attempt
