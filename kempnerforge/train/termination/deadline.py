"""Stop before the time limit: late enough to use the time, early enough to commit the last step."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence

from kempnerforge.slurm.deadline import JobEnd
from kempnerforge.slurm.job import this_job

RECENT_STEPS = 500
RECENT_SAVES = 200


def p99(values: Sequence[float]) -> float:
    """Return the 99th percentile by nearest rank: the maximum of up to 100 values, 0 without values."""
    return sorted(values)[math.ceil(0.99 * len(values)) - 1] if values else 0.0


def latest_start(
    end: float,
    *,
    saves_s: Sequence[float],
    steps_s: Sequence[float],
    margin_s: float,
    save_is_pending: bool = False,
) -> float:
    """Return the latest start of the final save: ``end`` - (p99 of saves + one more step + margin).

    One step is included because the deadline is checked after each step. While an earlier save is
    being written, the final save waits for it, so the time of a save is included twice. All values
    are in seconds.
    """
    save_s = p99(saves_s) * (2 if save_is_pending else 1)
    return end - (save_s + p99(steps_s) + margin_s)


class Deadline:
    """The time limit of this attempt, on rank 0.

    Args:
        started: when the attempt's process started, Unix time.
        max_minutes: ``train.max_minutes``, counted from ``started``.
        margin_s: ``train.deadline_margin_s``.
        saves_s: durations of saves of earlier attempts.
        environ: environment variables, which name the SLURM job.
    """

    def __init__(
        self,
        *,
        started: float,
        max_minutes: float | None,
        margin_s: float,
        saves_s: Sequence[float] = (),
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._own_end = started + 60 * max_minutes if max_minutes is not None else None
        self._margin_s = margin_s
        job = this_job(environ)
        self._job = JobEnd(job, environ) if job is not None else None
        self._saves_s: deque[float] = deque(saves_s, RECENT_SAVES)
        self._steps_s: deque[float] = deque(maxlen=RECENT_STEPS)
        self._step_began: float | None = None
        self._reported = ""

    @property
    def at(self) -> float | None:
        """The earlier of the job's time limit and ``max_minutes``, Unix time. None without either."""
        ends = [self._own_end, self._job.at if self._job is not None else None]
        return min((end for end in ends if end is not None), default=None)

    @property
    def left_s(self) -> float | None:
        """Seconds until ``at``, negative after it."""
        return self.at - time.time() if self.at is not None else None

    def saved(self, seconds: float) -> None:
        """Record how long a save took, from the call to the commit."""
        self._saves_s.append(seconds)

    def step_begins(self) -> None:
        """Start the timer of a step, which includes loading data and training."""
        self._step_began = time.monotonic()

    def step_ends(self) -> None:
        """Stop the timer of a step."""
        if self._step_began is not None:
            self._steps_s.append(time.monotonic() - self._step_began)
            self._step_began = None

    def slice_ends(self) -> None:
        """End a slice of a validation, which counts as a step, and begin the next slice or step."""
        if self._steps_s:  # not before the first step, see ``is_due``
            self.step_ends()
        self.step_begins()

    def is_due(self, *, save_is_pending: bool) -> bool:
        """Whether the final save must start now.

        Always False before the first step of this attempt. Otherwise a limit that is too short
        would end every attempt without progress.
        """
        if self.at is None or not self._steps_s:
            return False
        return time.time() >= latest_start(
            self.at,
            saves_s=self._saves_s,
            steps_s=self._steps_s,
            margin_s=self._margin_s,
            save_is_pending=save_is_pending,
        )

    def status_message(self) -> str:
        """Return the message that SLURM cannot be queried, once. Otherwise return ""."""
        problem = self._job.problem if self._job is not None else ""
        if not problem or self._reported:
            return ""
        self._reported = problem
        known = "using the end in the environment" if self.at is not None else "the job's end is not known"
        return f"deadline: {problem}; {known}"

    def close(self) -> None:
        """Stop querying SLURM."""
        if self._job is not None:
            self._job.close()
