"""Whether a job goes on when its training has ended: a pure function, and why it says so."""

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
"""Words in the reason of a stop that only a person gives: Ctrl-C, and a stop file that names no signal."""

LOST_LIMIT = 3
"""Attempts in a row that may be lost before their first commit."""


@dataclass(frozen=True)
class Decision:
    """What becomes of the job."""

    requeue: bool
    status: int
    """What the batch script ends with when it is not requeued; chains of jobs depend on it."""
    why: str
    exclude: tuple[str, ...] = ()
    """Nodes to leave out from now on."""


def decide(
    *,
    job_state: str,
    status: int | None,
    reason: str = "",
    asked: str = "",
    lost_nodes: Sequence[str] = (),
    faulty_nodes: Sequence[str] = (),
    lost_in_a_row: int | None = None,
    may_requeue: bool = True,
) -> Decision:
    """Whether the job is put back into the queue.

    Args:
        job_state: what ``squeue`` says. Anything but RUNNING means that SLURM itself is ending the job: it
            was cancelled, or is being requeued already.
        status: the exit status that this attempt left in the run's folder; None when it left none.
        reason: what it said beside that.
        asked: how SLURM asked this attempt to stop, as far as the job itself can tell; empty when it did not.
        lost_nodes: nodes of the job that SLURM takes for lost.
        faulty_nodes: nodes of the job that faults recorded by this attempt name. The trainer's breaker
            (status 76) bounds how often a run that makes no progress is put back for them.
        lost_in_a_row: newest attempts that committed nothing and went away without a word, or with a rank
            that did; None when this one did not end so. SLURM misses a dead node only minutes later, so one
            such end is a reason to go on; the breaker does not count them, so several are a reason to stop.
        may_requeue: whether SLURM would do it. Of a job with --no-requeue the next one of a chain goes on.
    """
    found = _decide(job_state, status, reason, asked, tuple(lost_nodes), tuple(faulty_nodes), lost_in_a_row)
    if found.requeue and not may_requeue:
        return Decision(False, found.status, f"{found.why}, but the job is not to be requeued (--no-requeue)")
    return found


def _decide(
    job_state: str,
    status: int | None,
    reason: str,
    asked: str,
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
        return Decision(True, end, "work is left", bad)
    if asked:
        # It came before the trainer could handle signals, or broke a collective; its commits stand.
        return Decision(True, end, f"it was asked to stop ({asked})", bad)
    if lost_nodes:
        return Decision(True, end, f"it lost {', '.join(lost_nodes)}", bad)
    if faulty_nodes:
        return Decision(True, end, f"a recorded fault names {', '.join(faulty_nodes)}", bad)
    if lost_in_a_row is not None and lost_in_a_row < LOST_LIMIT:
        return Decision(True, end, "a rank was killed or lost", bad)
    told = "it left no word in the run's folder" if status is None else f"it ended in a fault ({status})"
    return Decision(False, end, f"{told}; see the log")
