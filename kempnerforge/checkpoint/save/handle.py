"""``SaveHandle``: the caller's handle on a save that has begun."""

from __future__ import annotations

import atexit
import logging
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from kempnerforge.checkpoint.save.pipeline import (
    FailedSave,
    RankProgress,
    RankSave,
    SaveJob,
    SaveResult,
    result_key,
)
from kempnerforge.errors import SaveFailedError

log = logging.getLogger(__name__)

RATES = 8
"""Number of recent saves whose rates are remembered."""
OUTCOME_MARGIN_S = 60.0
"""Seconds after the time-out of a save within which the first rank posts its outcome."""

_unreported: dict[RankProgress, Path] = {}
"""Saves whose outcome has not been reported yet, with their paths. Holds no reference to host buffers."""


@atexit.register
def _report_failures() -> None:
    """Report failed saves when the interpreter exits. Python has joined their threads by then."""
    for progress in list(_unreported):
        _report_failure(progress)


def _report_failure(progress: RankProgress) -> None:
    """Log that a save failed, unless it was reported. First rank only."""
    final = _unreported.pop(progress, None)
    if final is not None and progress.result is not None and progress.result.error:
        log.error("kempnerforge: %s was not saved: %s", final, progress.result.error)


@dataclass
class SaveHistory:
    """What a checkpointer remembers of its earlier saves."""

    rates: deque[float] = field(default_factory=lambda: deque(maxlen=RATES))
    """Bytes per second of the largest rank in the last saves, from the call to the commit."""
    failed: FailedSave | None = None
    """On the first rank: the previous save, if it failed and other ranks may still write its files."""

    def add(self, job: SaveJob, result: SaveResult) -> None:
        """Remember the outcome of ``job``."""
        job.remember_frozen(not result.error and not result.skipped)
        if result.error:
            if job.rank == 0:
                self.failed = FailedSave.of(job)
        elif result.total_s and job.largest_bytes and not result.linked_bytes:
            # Without tensors, and with links, the rate does not measure the storage.
            self.rates.append(job.largest_bytes / result.total_s)


class SaveHandle:
    """One save, on this rank. Returned by ``AsyncCheckpointer.begin_save``; no method is collective.

    Call its methods on one thread, which need not be the one that saves: they take no lock.
    Holds the save's buffers until ``result`` has returned or raised.
    """

    def __init__(self, save: RankSave, history: SaveHistory) -> None:
        job = save.job
        self.name = job.final.name
        self.progress = job.progress
        self.started = job.started
        self._number = job.number
        self._timeout_s = job.timeout_s
        self._channel = save.channel
        self._save: RankSave | None = save
        self._history = history
        self._result: SaveResult | None = None
        _unreported[job.progress] = job.final

    @property
    def is_read(self) -> bool:
        """Whether ``result`` has returned or raised the outcome."""
        return self._save is None

    def wait_until_staged(self) -> None:
        """Return when the tensors of the save may be modified.

        Blocks: until the copy is done. On CUDA the device waits, not the host.
        """
        if self._save is not None:
            self._save.job.staging.before_mutation()

    def peek(self) -> SaveResult | None:
        """Return the outcome; None while it is unknown to this rank. Never blocks."""
        if self._result is None:
            message = self._channel.read(result_key(self._number))
            self._result = SaveResult(**message) if message is not None else None
        return self._result

    def done(self) -> bool:
        """Return whether the outcome is known to this rank. Never blocks."""
        return self.peek() is not None

    def result(self) -> SaveResult:
        """Wait until the save has ended, and return its outcome.

        Raises SaveFailedError if it failed, with the rank and the cause.
        """
        self.join()
        if self._save is None and not self.done():
            raise SaveFailedError(f"{self.name}: the checkpointer was closed before the outcome was known")
        deadline, pause_s = time.monotonic() + self._timeout_s + OUTCOME_MARGIN_S, 0.001
        while (result := self.peek()) is None:
            if time.monotonic() > deadline:
                raise SaveFailedError(f"{self.name}: the first rank has not reported the outcome")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.05)
        save, self._save = self._save, None
        if save is not None:
            _unreported.pop(self.progress, None)
            self._history.add(save.job, result)
        if result.error:
            raise SaveFailedError(f"{self.name} was not saved: {result.error}")
        return result

    def join(self) -> None:
        """Wait for this rank's part of the save, without raising. The buffers are free on return."""
        if self._save is not None:
            self._save.writer.set_priority(urgent=True)
            if self._save.thread is not None:
                self._save.thread.join()
            self._save.job.staging.wait_until_idle()  # needed if there was no thread

    def close(self) -> None:
        """Wait as ``join`` does. Log a failure that ``result`` has not raised."""
        self.join()
        if self._save is not None:
            self._save = None
            _report_failure(self.progress)
