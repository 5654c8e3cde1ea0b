"""Every reason to stop early, as one number that rides on the agreement after a step."""

from __future__ import annotations

import signal
from pathlib import Path

from kempnerforge.checkpoint.run.attempt_start import attempt_started
from kempnerforge.checkpoint.run.request_files import RequestFiles
from kempnerforge.config.schema import JobConfig
from kempnerforge.distributed.consensus import ControlGroup
from kempnerforge.errors import StopRequestedError
from kempnerforge.goodput.event_log import read_events, saves_s
from kempnerforge.train.hangs.stack_dump import Stacks
from kempnerforge.train.termination.deadline import Deadline
from kempnerforge.train.termination.signals import StopSignals
from kempnerforge.train.termination.stop_request import StopFile
from kempnerforge.train.termination.watchdog import Shutdown

_DEADLINE = 100
_SIGNAL = 200
_FILE = 300
"""Of several reasons the largest is given: a file may say more than the signal beside it."""


class StopConditions:
    """What this rank knows of a stop. The file and the deadline are rank 0's alone."""

    def __init__(self, signals: StopSignals, shutdown: Shutdown, stacks: Stacks) -> None:
        self.signals = signals
        self.file: StopFile | None = None
        self.requests: RequestFiles | None = None
        """Looks for the files that ask the run for something, on rank 0."""
        self.deadline: Deadline | None = None
        self.shutdown = shutdown
        self.stacks = stacks

    def open(self, job: JobConfig, attempt: int, *, is_first: bool) -> None:
        """The run's folder is this attempt's: rank 0 looks for the file and at the clock from now on."""
        folder = job.run.folder
        self.stacks.open(folder, attempt)
        if not is_first:
            return
        started = attempt_started()
        self.file = StopFile(folder)
        self.file.remove_stale(started)
        self.requests = RequestFiles(folder)
        self.file.watch(self.requests)
        self.deadline = Deadline(
            started=started,
            max_minutes=job.train.max_minutes,
            margin_s=job.train.deadline_margin_s,
            saves_s=_earlier_saves_s(folder),
        )

    def close(self) -> None:
        """The attempt has ended in order. Main thread only."""
        if self.deadline is not None:
            self.deadline.close()
        if self.requests is not None:
            self.requests.close()
        self.shutdown.close()

    def step_ends(self) -> None:
        """Everything from ``step_begins`` to here is one step: data and training."""
        if self.deadline is not None:
            self.deadline.step_ends()

    def slice_ends(self) -> None:
        """A slice of a validation, after which a stop is possible, ends and the next one begins."""
        if self.deadline is not None:
            self.deadline.slice_ends()

    def step_begins(self) -> str:
        """See ``step_ends``. Returns what there is to say of the deadline, once; empty on other ranks."""
        if self.deadline is None:
            return ""
        self.deadline.step_begins()
        return self.deadline.news()

    def saved(self, seconds: float) -> None:
        """A save took so long, from the call to the commit."""
        if self.deadline is not None:
            self.deadline.saved(seconds)

    @property
    def left_s(self) -> float | None:
        """Seconds until the deadline; None when there is none, and on other ranks."""
        return self.deadline.left_s if self.deadline is not None else None

    def vote(self, *, save_is_pending: bool = False) -> int:
        """This rank's part in the agreement; 0 to go on."""
        if self.file is not None and self.file.is_there():
            return _FILE
        if self.signals.received:
            return _SIGNAL + self.signals.received
        due = self.deadline is not None and self.deadline.is_due(save_is_pending=save_is_pending)
        return _DEADLINE if due else 0

    def reason(self, agreed: int, control: ControlGroup) -> str | None:
        """From the maximum of all votes: why all ranks stop now, or None.

        Collective: all ranks of ``control``, with the same ``agreed``. Consumes the file.
        """
        if not agreed:
            return None
        if _SIGNAL < agreed < _FILE:
            self.shutdown.agreed(agreed - _SIGNAL)
        told = control.run_on_rank0(lambda: self.file.consume() if self.file is not None else "", brief=True)
        if agreed == _FILE:
            return told
        return "deadline" if agreed == _DEADLINE else signal.Signals(agreed - _SIGNAL).name

    def end_set_up_if_asked(self, control: ControlGroup) -> None:
        """Between two parts of the set-up: there is nothing to commit yet.

        Collective: all ranks of ``control``. Raises StopRequestedError on all ranks.
        """
        reason = self.reason(control.agree([self.vote()])[0], control)
        if reason is not None:
            error = StopRequestedError(reason)
            error.agreed = True
            raise error


def _earlier_saves_s(folder: Path) -> list[float]:
    """What the saves of earlier attempts took; nothing when their record cannot be read."""
    try:
        return saves_s(read_events(folder))
    except OSError:  # the record of this attempt, in the same file, says so
        return []
