"""What the run's folder says about its progress: the newest step, and why the last attempt failed."""

from __future__ import annotations

from pathlib import Path

from kempnerforge.checkpoint.run import metadata, owner
from kempnerforge.errors import RunFolderError
from kempnerforge.goodput import crash_loop_guard
from kempnerforge.goodput.history import AttemptHistory, read_history


def newest_step(run_dir: Path) -> int:
    """Return the newest committed step of the run; 0 without one, or if the folder cannot be read."""
    try:
        record = metadata.read(run_dir)
        if record is None:
            return 0
        checkpoints = record.checkpoint_folder(run_dir)
        return owner.newest_step(checkpoints, owner.of_folder(checkpoints, run_dir)) or 0
    except (OSError, RunFolderError):
        return 0


def read_attempts(run_dir: Path) -> list[AttemptHistory]:
    """Return all attempts of the run; none if they cannot be read."""
    try:
        record = metadata.read(run_dir)
        rollbacks = [rollback.attempt for rollback in record.rollbacks] if record is not None else []
        return read_history(run_dir, rollbacks=rollbacks)
    except (OSError, RunFolderError):
        return []


def recorded_cause(attempts: list[AttemptHistory], *, after_attempt: int) -> str:
    """Return the fault that ended the last attempt, on one line; empty if it recorded none.

    ``after_attempt`` is the last attempt before the ranks were started.
    """
    if not attempts or attempts[-1].number <= after_attempt or attempts[-1].kind != "fault":
        return ""
    return attempts[-1].reason.partition("\n")[0]


def blames_one_node(attempts: list[AttemptHistory], *, newest_step: int, limit: int) -> bool:
    """Return whether all faults since the last commit name the same node, and one more blocks the run.

    Then the last start is better made without that node.
    """
    row = crash_loop_guard.without_progress(attempts, newest_committed=newest_step)
    hosts = {attempt.cause.host if attempt.cause is not None else "" for attempt in row}
    return 0 < len(row) == limit - 1 and len(hosts) == 1 and "" not in hosts
