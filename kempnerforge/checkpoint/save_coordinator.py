"""``SaveCoordinator``: runs one save at a time, defers others, counts failures and measures costs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from kempnerforge.checkpoint.async_save import AsyncCheckpointer
from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.results import Payload, SaveReport
from kempnerforge.checkpoint.run.save_events import MAX_EVENTS, PutOff, SaveEvent
from kempnerforge.checkpoint.save.pipeline import SaveRequest, SaveResult
from kempnerforge.checkpoint.schedule.overhead import StepTimer
from kempnerforge.distributed.consensus import ControlGroup
from kempnerforge.errors import SaveFailedError


class StepVotes(NamedTuple):
    """One rank's votes after a step. Ranks agree on the maximum of each number."""

    requested: int
    """1 if this rank was asked to save."""
    since_save_ms: int
    """Milliseconds since the last save began, on the first rank; 0 on others."""
    known_saves: int
    """Saves of this attempt whose outcome this rank knows."""
    lease_lost: int
    """1 if another attempt has taken over the run."""
    bound_ms: int
    """An interval makes no save due earlier than this many milliseconds after the last save."""
    auto_ms: int
    """Milliseconds between saves under ``interval = "auto"``."""


class SaveCoordinator:
    """Runs the saves of a loop. All ranks make the same calls in the same order."""

    def __init__(
        self,
        checkpointer: AsyncCheckpointer,
        folder: Path,
        control: ControlGroup,
        *,
        max_failed_saves: int,
    ) -> None:
        self._checkpointer = checkpointer
        self.folder = folder
        self._control = control
        self._max_failed_saves = max_failed_saves
        self._pending: SaveReport | None = None
        """The report of the pending save, as far as it is known."""
        self._num_begun = 0
        self._failed_in_a_row = 0
        self._deferral: PutOff | None = None
        self._num_deferred = 0
        self._reports: list[SaveReport] = []
        self._events: deque[SaveEvent] = deque(maxlen=MAX_EVENTS)
        self.on_report: Callable[[SaveReport], None] = lambda _report: None
        """Called on the calling thread with each report, when all ranks know the outcome."""
        self.clock = StepTimer()
        self.committed_step: int | None = None
        """The newest step that is known to be committed."""

    @property
    def newest_step(self) -> int | None:
        """The newest step that is being saved or known to be committed."""
        return self._pending.step if self._pending is not None else self.committed_step

    @property
    def known_saves(self) -> int:
        """How many saves have an outcome that this rank knows. The first rank learns it before the others."""
        is_open = self._pending is not None and self._checkpointer.poll() is None
        return self._num_begun - is_open

    @property
    def deferred_reason(self) -> str | None:
        """Why a save is due that waits for the end of the pending one. None without such a save."""
        return self._deferral.reason if self._deferral is not None else None

    def take_result(self, known_saves: int, *, step: int) -> None:
        """Report the pending save if ``known_saves`` includes it. Collective.

        ``known_saves``: the agreed maximum over all ranks. Raises SaveFailedError on all ranks
        after too many failures in a row.
        """
        if self._pending is not None and known_saves >= self._num_begun:
            self._end(self._result(), step, at_boundary=True)

    def wait_for_result(self, step: int) -> float:
        """Wait for the outcome of a pending save and report it. Collective. Return the seconds waited."""
        if self._pending is None:
            return 0.0
        started = time.perf_counter()
        result = self._result()
        waited_s = time.perf_counter() - started
        self.clock.meter.add_blocking_time(waited_s)
        self._end(result, step)
        return waited_s

    def select(self, due: str | None, step: int) -> str | None:
        """Return the reason to save after ``step``, or None. Defer the save while another is pending."""
        reason = due or self.deferred_reason
        if reason is not None and self._pending is not None:
            self._num_deferred += 1
            if self._deferral is None:
                self._deferral = PutOff(reason, self._pending.step, step, step)
                self._events.append(self._deferral.begins())
            self._deferral.reason, self._deferral.last = reason, step
            return None
        return reason

    def _end_deferral(self, saved_step: int | None) -> None:
        if self._deferral is not None:
            self._events.append(self._deferral.ends(saved_step))
            self._deferral = None

    def save(
        self, step: int, capture: Callable[[], Payload], request: SaveRequest, *, wait: bool
    ) -> SaveReport:
        """Begin a save. With ``wait``, return after the commit, and raise if the save fails. Collective.

        ``capture`` returns what this rank writes. Its error on one rank is raised on all.
        """
        started = time.perf_counter()
        reason = request.provenance.reason
        counted_s = self.wait_for_result(step)
        if step == self.committed_step:
            return SaveReport(step, reason, blocking_s=0.0)
        self._num_begun += 1
        self.clock.save_begins()
        deferred, self._num_deferred = self._num_deferred, 0
        self._end_deferral(step)
        # Set before the save begins: if the loop catches an interrupt (Ctrl-C), the next call still reports
        # the save.
        self._pending = SaveReport(step, reason, blocking_s=0.0, deferred=deferred, pending=True)
        try:
            folder = self.folder / paths.step_name(step)
            self._checkpointer.begin_save(capture, folder, self._control.group, request)
        except SaveFailedError as error:
            self._add_blocking_time(started, counted_s)
            return self._end(SaveResult(error=str(error)), step, must_commit=wait)
        except Exception:  # refused on all ranks
            self._pending = None
            raise
        if wait or self._checkpointer.blocks:
            result = self._result()
            self._add_blocking_time(started, counted_s)
            return self._end(result, step, must_commit=wait)
        blocking_s = self._add_blocking_time(started, counted_s)
        return SaveReport(step, reason, blocking_s=blocking_s, pending=True)

    def _add_blocking_time(self, started: float, counted_s: float = 0.0) -> float:
        """Add the time since ``started`` to the pending save, and return it.

        ``counted_s``: the part of it that the meter has added to an earlier save.
        """
        blocking_s = time.perf_counter() - started
        if self._pending is not None:
            self._pending = replace(self._pending, blocking_s=self._pending.blocking_s + blocking_s)
        self.clock.meter.add_blocking_time(blocking_s - counted_s)
        return blocking_s

    def skip(self, step: int, reason: str, why: str) -> SaveReport:
        """Skip a save before it begins, and report that."""
        self._end_deferral(None)
        self.clock.skipped()
        report = SaveReport(step, reason, blocking_s=0.0, skipped=why)
        self._add(report)
        return report

    def _add(self, report: SaveReport) -> None:
        self._reports.append(report)
        self.on_report(report)

    def events(self) -> list[SaveEvent]:
        """Return the events of deferred saves since the last call."""
        events = list(self._events)
        self._events.clear()
        return events

    def local_report(self) -> SaveReport | None:
        """Wait for this rank's part of the pending save. Return its report if this rank knows the outcome.

        Not collective, for a loop that ends without an agreement of all ranks.
        """
        self._checkpointer.join()
        result = self._checkpointer.poll()
        if self._pending is None or result is None:
            return None
        return replace(_with_result(self._pending, result), overhead_is_lower_bound=True)

    def wait_for_staging(self) -> None:
        """Return when tensors may be modified. The wait counts as blocking time."""
        if self._pending is not None:
            started = time.perf_counter()
            self._checkpointer.wait_for_staging()
            self._add_blocking_time(started)

    def reports(self) -> list[SaveReport]:
        """Return the reports since the last call."""
        reports, self._reports = self._reports, []
        return reports

    def wait(self) -> None:
        """Wait for a pending save without raising."""
        self._checkpointer.join()

    def close(self) -> None:
        """Finish a pending save without raising, and end the writer."""
        self._checkpointer.close()

    def _result(self) -> SaveResult:
        """Wait for the outcome of the pending save. Collective: all ranks return together.

        The rank that hosts the store, usually the first, may end its process right after this, so
        all ranks must have read the outcome by then.
        """
        save = self._checkpointer.last_save
        result = SaveResult(error="it was interrupted before it began")
        try:
            if save is not None:
                result = save.result()
        except SaveFailedError as error:
            result = SaveResult(error=str(error))
        self._control.agree([0])
        return result

    def _end(
        self, result: SaveResult, step: int, *, must_commit: bool = False, at_boundary: bool = False
    ) -> SaveReport:
        """Report the pending save and forget it.

        Raises SaveFailedError after too many failures in a row; with ``must_commit``, after one.
        """
        pending, self._pending = self._pending, None
        assert pending is not None
        cost = self.clock.meter.save_ended(durable_s=result.total_s, at_boundary=at_boundary)
        report = replace(
            _with_result(pending, result),
            lag_steps=step - pending.step,
            overhead_s=cost.overhead_s,
            overhead_is_lower_bound=cost.is_lower_bound,
            overhead_pct=self.clock.overhead_pct,
        )
        self._add(report)
        if result.skipped:
            self.clock.save_was_skipped()
            return report
        if not result.error:
            self._failed_in_a_row = 0
            self.committed_step = pending.step
            return report
        self._failed_in_a_row += 1
        if must_commit or self._failed_in_a_row >= self._max_failed_saves:
            count = self._failed_in_a_row
            times = "1 save" if count == 1 else f"{count} saves in a row"
            raise SaveFailedError(
                f"{times} failed; the newest committed step is {self.committed_step}. {result.error}"
            )
        return report


def _with_result(pending: SaveReport, result: SaveResult) -> SaveReport:
    return replace(
        pending,
        write_s=result.write_s,
        commit_s=result.commit_s,
        total_s=result.total_s,
        size_bytes=result.size_bytes,
        linked_bytes=result.linked_bytes,
        pending=False,
        skipped=result.skipped,
        error=result.error,
        warnings=tuple(result.warnings),
    )
