"""Unblock a run: reset the failure counter, and restore suspect steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from kempnerforge import fsio
from kempnerforge.checkpoint.format import manifest, paths
from kempnerforge.checkpoint.run import lease, lineage, metadata
from kempnerforge.checkpoint.run.lineage import ResumePoint
from kempnerforge.checkpoint.run.metadata import Restored
from kempnerforge.errors import DamagedCheckpointError, LeaseHeldError, MismatchError, RunFolderError
from kempnerforge.goodput.event_log import Ledger


@dataclass(frozen=True)
class Unblocked:
    """Result of ``unblock``."""

    attempt: int
    """The last attempt whose failures no longer count."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Old name -> new name of the restored steps."""
    left: dict[str, str] = field(default_factory=dict)
    """Name -> why a suspect step was not restored."""


def unblock(run_dir: Path) -> Unblocked:
    """Declare the cause of a run's failures fixed, and restore the names of suspect steps.

    A suspect step remains set aside if the run has since committed a step that does not descend
    from it. ``run.json`` is written before the first rename, and the ledger after the last. So
    after a kill, the command can be run again.

    Durable: on return. Raises RunFolderError, LeaseHeldError.
    """
    try:
        if writer := lease.live_holder(run_dir):
            raise LeaseHeldError(f"{run_dir} is being written by {writer}, so it is not blocked")
        record = metadata.read(run_dir)
        folder = record.checkpoint_folder(run_dir) if record is not None else run_dir / "checkpoints"
        suspects = paths.list_folder(folder).suspect
        if record is None or not suspects:
            done = Unblocked(lineage.last_attempt(run_dir))
        else:
            held = lease.acquire(run_dir, after_attempt=lineage.last_attempt(run_dir))
            try:
                done = _restore(run_dir, folder, suspects, held.attempt)
            finally:
                held.release()
        Ledger(run_dir, done.attempt).write("unblock")
    except OSError as error:
        raise RunFolderError(f"{run_dir} could not be unblocked: {error}") from error
    return done


def _restore(run_dir: Path, folder: Path, suspects: Sequence[Path], attempt: int) -> Unblocked:
    record = metadata.read(run_dir)
    assert record is not None
    cuts, committed = lineage.cuts(run_dir), paths.committed_steps(folder)
    done = Unblocked(attempt)
    restored: list[Restored] = []
    for path in sorted(suspects, reverse=True):
        step = paths.step_number(path.name.split(".")[1])
        assert step is not None
        why, since = _why_not(path, step, record.run_id, cuts, committed)
        if not why and paths.step_name(step) in done.renamed.values():
            why = f"another step was restored as {paths.step_name(step)}"
        if why:
            done.left[path.name] = why
            continue
        done.renamed[path.name] = paths.step_name(step)
        if since:
            restored.append(Restored(step, since, attempt))
    metadata.write(run_dir, replace(record, attempt=attempt, restored=(*record.restored, *restored)))
    for old, new in done.renamed.items():
        (folder / old).rename(folder / new)
    if done.renamed:
        fsio.fsync_folder(folder)
    return done


def _why_not(
    path: Path, step: int, run_id: str, cuts: Sequence[ResumePoint], committed: Sequence[int]
) -> tuple[str, int]:
    """Return why the step cannot be restored, and the first attempt that began below it; 0 if none did."""
    try:
        provenance = manifest.read(path).provenance
    except (DamagedCheckpointError, MismatchError) as error:
        return str(error), 0
    if provenance.run_id != run_id:
        return f"it belongs to another run, {provenance.run_id}", 0
    below = [cut for cut in cuts if cut.leaves_behind(step, provenance.attempt)]
    if not below:
        return (f"step {step} was committed again", 0) if step in committed else ("", 0)
    lowest = min(below, key=lambda cut: cut.step)
    if rollback := next((cut for cut in below if cut.is_rollback), None):
        return f"the run was since rolled back to step {rollback.step}", 0
    if newer := [number for number in committed if number > lowest.step]:
        return f"the run has since resumed from step {lowest.step} and committed step {max(newer)}", 0
    return "", min(cut.attempt for cut in below)
