"""Every reason to stop early, encoded as one number in the agreement after a step."""

from __future__ import annotations

import signal

from kempnerforge.checkpoint.run.attempt_start import attempt_started
from kempnerforge.checkpoint.run.request_files import RequestFiles
from kempnerforge.config.schema import JobConfig
from kempnerforge.distributed.consensus import ControlGroup
from kempnerforge.errors import StopRequestedError
from kempnerforge.goodput.event_log import saves_s
from kempnerforge.goodput.run_history import RunHistory
from kempnerforge.train.hangs.stack_dump import Stacks
from kempnerforge.train.termination.deadline import Deadline
from kempnerforge.train.termination.signals import StopSignals
from kempnerforge.train.termination.stop_request import StopFile
from kempnerforge.train.termination.watchdog import Shutdown

_DEADLINE = 100
_SIGNAL = 200
_FILE = 300
"""Ranks agree on the largest number. The request file has the largest because it may contain a reason."""


class StopConditions:
    """The reasons to stop that this rank knows. Only rank 0 has the request file and the deadline."""

    def __init__(self, signals: StopSignals, shutdown: Shutdown, stacks: Stacks) -> None:
        self.signals = signals
        self.file: StopFile | None = None
        self.requests: RequestFiles | None = None
        """Polls for request files, on rank 0."""
        self.deadline: Deadline | None = None
        self.shutdown = shutdown
        self.stacks = stacks

    def open(self, job: JobConfig, attempt: int, history: RunHistory, *, is_first: bool) -> None:
        """Begin to check the request file and the deadline, on rank 0.

        The attempt must already own the run's folder.
        """
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
            saves_s=_earlier_saves_s(history),
        )

    def close(self) -> None:
        """Stop checking after an orderly end of the attempt. Main thread only."""
        if self.deadline is not None:
            self.deadline.close()
        if self.requests is not None:
            self.requests.close()
        self.shutdown.close()

    def step_ends(self) -> None:
        """Stop the timer that ``step_begins`` started."""
        if self.deadline is not None:
            self.deadline.step_ends()

    def slice_ends(self) -> None:
        """End a slice of a validation, after which a stop is possible, and begin the next one."""
        if self.deadline is not None:
            self.deadline.slice_ends()

    def step_begins(self) -> str:
        """Start the timer of a step, which includes loading data and training.

        Returns the status message of the deadline. Empty on ranks other than 0.
        """
        if self.deadline is None:
            return ""
        self.deadline.step_begins()
        return self.deadline.status_message()

    def saved(self, seconds: float) -> None:
        """Record how long a save took, from the call to the commit."""
        if self.deadline is not None:
            self.deadline.saved(seconds)

    @property
    def left_s(self) -> float | None:
        """Seconds until the deadline. None without one, and on ranks other than 0."""
        return self.deadline.left_s if self.deadline is not None else None

    def vote(self, *, save_is_pending: bool = False) -> int:
        """Return this rank's vote in the agreement; 0 to continue."""
        if self.file is not None and self.file.is_there():
            return _FILE
        if self.signals.received:
            return _SIGNAL + self.signals.received
        due = self.deadline is not None and self.deadline.is_due(save_is_pending=save_is_pending)
        return _DEADLINE if due else 0

    def reason(self, agreed: int, control: ControlGroup) -> str | None:
        """Return why all ranks stop now, or None, from the maximum of all votes.

        Collective: all ranks of ``control``, with the same ``agreed``. Consumes the request file.
        """
        if not agreed:
            return None
        if _SIGNAL < agreed < _FILE:
            self.shutdown.agreed(agreed - _SIGNAL)
        text = control.run_on_rank0(lambda: self.file.consume() if self.file is not None else "", brief=True)
        if agreed == _FILE:
            return text
        return "deadline" if agreed == _DEADLINE else signal.Signals(agreed - _SIGNAL).name

    def raise_if_stop_requested(self, control: ControlGroup) -> None:
        """Raise StopRequestedError between two parts of the setup if a stop was requested.

        Nothing has to be committed yet. Collective: all ranks of ``control``. Raises on all ranks.
        """
        reason = self.reason(control.agree([self.vote()])[0], control)
        if reason is not None:
            error = StopRequestedError(reason)
            error.agreed = True
            raise error


def _earlier_saves_s(history: RunHistory) -> list[float]:
    """Return the durations of saves of earlier attempts, or none when the ledger cannot be read."""
    try:
        return saves_s(history.events())
    except OSError:  # this attempt's own write to the same file reports it
        return []
