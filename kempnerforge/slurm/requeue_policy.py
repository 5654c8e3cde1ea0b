"""Decide whether to requeue a job whose training has ended, and give the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kempnerforge.errors import (
    EXIT_BAD_CONFIG,
    EXIT_FAULT,
    EXIT_FINISHED,
    EXIT_NO_PROGRESS,
    EXIT_STOPPED,
)

BY_HAND = ("SIGINT", "stop.request")
"""Words in the reason of a stop that a person requested: Ctrl-C, or a stop file that names no signal."""

LOST_LIMIT = 3
"""Do not requeue after this many attempts in a row that were lost before their first commit."""


@dataclass(frozen=True)
class Decision:
    """The decision about a job."""

    requeue: bool
    status: int
    """Exit status of the batch script if it is not requeued. Job dependencies rely on it."""
    why: str
    exclude: tuple[str, ...] = ()
    """Nodes to exclude from the next starts."""


def decide(
    *,
    job_state: str,
    status: int | None,
    reason: str = "",
    stop_requested_by: str = "",
    lost_nodes: Sequence[str] = (),
    faulty_nodes: Sequence[str] = (),
    lost_in_a_row: int | None = None,
    may_requeue: bool = True,
) -> Decision:
    """Decide whether to requeue the job.

    Args:
        job_state: state in ``squeue``. Any state but RUNNING means that SLURM itself is ending the
            job: it was cancelled, or is already being requeued.
        status: the exit status that this attempt recorded in the run's folder; None if it recorded
            none.
        reason: the recorded reason.
        stop_requested_by: how SLURM requested a stop, if the job can detect it; empty without a
            request.
        lost_nodes: nodes of the job that SLURM considers lost.
        faulty_nodes: nodes of the job in faults that this attempt recorded. The crash-loop guard
            (status 76) limits how often a run without progress is requeued because of them.
        lost_in_a_row: number of newest attempts that committed nothing and ended without a record,
            or with a rank that did; None if this one ended differently. SLURM detects a dead node
            only minutes later, so a single such end is a reason to requeue. The crash-loop guard
            does not count them, so several are a reason to stop.
        may_requeue: whether SLURM permits it. After a job with --no-requeue, the next job of a
            chain resumes.
    """
    decision = _decide(
        job_state, status, reason, stop_requested_by, tuple(lost_nodes), tuple(faulty_nodes), lost_in_a_row
    )
    if decision.requeue and not may_requeue:
        return Decision(False, decision.status, f"{decision.why}, but the job has --no-requeue")
    return decision


def _decide(
    job_state: str,
    status: int | None,
    reason: str,
    stop_requested_by: str,
    lost_nodes: tuple[str, ...],
    faulty_nodes: tuple[str, ...],
    lost_in_a_row: int | None,
) -> Decision:
    end = EXIT_FAULT if status is None else status
    if job_state != "RUNNING":
        return Decision(False, end, f"SLURM is ending the job ({job_state or 'not listed'})")
    if status == EXIT_FINISHED:
        return Decision(False, end, "the run is finished")
    if status == EXIT_BAD_CONFIG:
        return Decision(False, end, "the same configuration would fail again")
    if status == EXIT_NO_PROGRESS:
        return Decision(False, end, "several attempts in a row made no progress")
    bad = tuple(sorted({*lost_nodes, *faulty_nodes}))
    if status == EXIT_STOPPED:
        if any(word in reason for word in BY_HAND) and "SIGTERM" not in reason and "SIGUSR1" not in reason:
            return Decision(False, end, f"it was stopped by hand ({reason})")
        return Decision(True, end, "the run is not finished", bad)
    if stop_requested_by:
        # The signal came before the trainer could handle signals, or broke a collective. Commits
        # are kept.
        return Decision(True, end, f"a stop was requested ({stop_requested_by})", bad)
    if lost_nodes:
        return Decision(True, end, f"it lost {', '.join(lost_nodes)}", bad)
    if faulty_nodes:
        return Decision(True, end, f"a recorded fault names {', '.join(faulty_nodes)}", bad)
    if lost_in_a_row is not None and lost_in_a_row < LOST_LIMIT:
        return Decision(True, end, "a rank was killed or lost", bad)
    ended = "it recorded no exit status" if status is None else f"it ended in a fault ({status})"
    return Decision(False, end, f"{ended}; see the log")
