"""Stopping before the time is up: late enough to use it, early enough to commit the last step."""

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
    """The smallest value that 99% of all are not above (nearest rank); 0 of none. Below 100, the largest."""
    return sorted(values)[math.ceil(0.99 * len(values)) - 1] if values else 0.0


def latest_start(
    end: float,
    *,
    saves_s: Sequence[float],
    steps_s: Sequence[float],
    margin_s: float,
    save_is_pending: bool = False,
) -> float:
    """When the final save has to start at the latest: ``end`` - (p99 of saves + one more step + margin).

    The step is there because this is looked at after each step: who goes on now asks again only then. While
    an earlier save is being written, the final one waits for it, so its time counts twice. All in seconds.
    """
    save_s = p99(saves_s) * (2 if save_is_pending else 1)
    return end - (save_s + p99(steps_s) + margin_s)


class Deadline:
    """The end of this attempt's time, as rank 0 sees it.

    Args:
        started: when the attempt's process started, Unix time.
        max_minutes: ``train.max_minutes``, from then on.
        margin_s: ``train.deadline_margin_s``.
        saves_s: what saves of earlier attempts took.
        environ: a SLURM job's names it.
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
        self._told = ""

    @property
    def at(self) -> float | None:
        """The earlier of the job's end and of ``max_minutes``, Unix time; None when there is neither."""
        ends = [self._own_end, self._job.at if self._job is not None else None]
        return min((end for end in ends if end is not None), default=None)

    @property
    def left_s(self) -> float | None:
        """Seconds until then, negative after it."""
        return self.at - time.time() if self.at is not None else None

    def saved(self, seconds: float) -> None:
        """A save took so long, from the call to the commit."""
        self._saves_s.append(seconds)

    def step_begins(self) -> None:
        """Everything up to the next ``step_ends`` is one step: data and training."""
        self._step_began = time.monotonic()

    def step_ends(self) -> None:
        """See ``step_begins``."""
        if self._step_began is not None:
            self._steps_s.append(time.monotonic() - self._step_began)
            self._step_began = None

    def slice_ends(self) -> None:
        """A slice of a validation ends and the next one, or a step, begins: it counts as a step does."""
        if self._steps_s:  # not before the first step: see ``is_due``
            self.step_ends()
        self.step_begins()

    def is_due(self, *, save_is_pending: bool) -> bool:
        """Whether the final save has to start now.

        Never before this attempt has done a step: a limit too short for anything must not end attempt after
        attempt where it began.
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

    def news(self) -> str:
        """What there is to say, once: that SLURM cannot be asked. A note, not a fault."""
        problem = self._job.problem if self._job is not None else ""
        if not problem or self._told:
            return ""
        self._told = problem
        known = "what the environment says counts" if self.at is not None else "the job's end is not known"
        return f"deadline: {problem}; {known}"

    def close(self) -> None:
        """Ask SLURM no more."""
        if self._job is not None:
            self._job.close()
