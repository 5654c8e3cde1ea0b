"""Saves of a loop: one at a time, others put off; counts failures and measures costs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kempnerforge.checkpoint.async_save import AsyncCheckpointer
from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.format.manifest import Provenance
from kempnerforge.checkpoint.results import Payload, SaveReport
from kempnerforge.checkpoint.run.save_events import MAX_EVENTS, PutOff, SaveEvent
from kempnerforge.checkpoint.save.pipeline import SaveResult
from kempnerforge.checkpoint.schedule.overhead import StepTimer
from kempnerforge.distributed.consensus import ControlGroup
from kempnerforge.errors import SaveFailedError


@dataclass
class Snapshot:
    """One step to save."""

    step: int
    capture: Callable[[], Payload]
    """Returns what this rank writes; its error on one rank is raised on all."""
    provenance: Provenance
    config_toml: str
    before_write: Callable[[], str]
    """Runs on the first rank's background thread before anything is written; returns why to leave the save
    out, or nothing."""
    before_commit: Callable[[], None]
    """Runs on the first rank's background thread before the rename; raises to forbid it."""
    after_commit: Callable[[], None]
    """Runs on the first rank's background thread when all ranks can know of the commit; does not block."""


@dataclass
class _Pending:
    step: int
    number: int
    reason: str
    blocking_s: float = 0.0
    deferred: int = 0


class Saver:
    """Drives an ``AsyncCheckpointer`` for a loop. All ranks make the same calls in the same order."""

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
        self._pending: _Pending | None = None
        self._number = 0
        self._failed_in_a_row = 0
        self._put_off: PutOff | None = None
        self._deferred = 0
        self._reports: list[SaveReport] = []
        self._events: deque[SaveEvent] = deque(maxlen=MAX_EVENTS)
        self.on_outcome: Callable[[SaveReport], None] = lambda _report: None
        """Called with each outcome when all ranks know it, on the calling thread."""
        self.clock = StepTimer()
        self.committed_step: int | None = None
        """The newest step that this attempt knows to be committed."""

    @property
    def newest_step(self) -> int | None:
        """The newest step that is committed or being saved, as this attempt knows."""
        return self._pending.step if self._pending is not None else self.committed_step

    def settled(self) -> int:
        """Number of the newest save whose outcome this rank knows; the first rank knows first."""
        if self._pending is not None and self._checkpointer.poll() is not None:
            return self._pending.number
        return self._number - (self._pending is not None)

    def learn(self, settled: int, *, step: int) -> None:
        """Take in the outcome of the pending save, if ``settled``, which all ranks agreed on, covers it.

        Raises SaveFailedError on all ranks after too many failures in a row.
        """
        if self._pending is not None and settled >= self._pending.number:
            self._settle(self._await_outcome(), step, at_boundary=True)

    def settle(self, step: int) -> float:
        """Wait for the outcome of a pending save. Collective. Returns the seconds that this took."""
        if self._pending is None:
            return 0.0
        started = time.perf_counter()
        result = self._await_outcome()
        waited_s = time.perf_counter() - started
        self.clock.meter.add_blocking_time(waited_s)
        self._settle(result, step)
        return waited_s

    def choose(self, due: str | None, step: int) -> str | None:
        """Return why to save after ``step``: ``due`` or a save put off. None while one is being written."""
        reason = due or (self._put_off.reason if self._put_off is not None else None)
        if reason is not None and self._pending is not None:
            self._deferred += 1
            if self._put_off is None:
                self._put_off = PutOff(reason, self._pending.step, step, step)
                self._events.append(self._put_off.begins())
            self._put_off.reason, self._put_off.last = reason, step
            return None
        return reason

    def _end_putting_off(self, saved_step: int | None) -> None:
        if self._put_off is not None:
            self._events.append(self._put_off.ends(saved_step))
            self._put_off = None

    def save(self, snapshot: Snapshot, *, reason: str, wait: bool) -> SaveReport:
        """Begin to save. With ``wait``, return after the commit and raise if it fails. Collective."""
        started = time.perf_counter()
        counted_s = self.settle(snapshot.step)
        if snapshot.step == self.committed_step:
            return SaveReport(snapshot.step, reason, blocking_s=0.0)
        self._number += 1
        self.clock.save_begins()
        deferred, self._deferred = self._deferred, 0
        self._end_putting_off(snapshot.step)
        # Set before: after an interrupt (Ctrl-C) that the loop catches, the next call asks what came of it.
        self._pending = pending = _Pending(snapshot.step, self._number, reason, deferred=deferred)
        try:
            self._checkpointer.begin_save(
                snapshot.capture,
                self.folder / paths.step_name(snapshot.step),
                self._control.group,
                provenance=snapshot.provenance,
                config_toml=snapshot.config_toml,
                before_write=snapshot.before_write,
                before_commit=snapshot.before_commit,
                after_commit=snapshot.after_commit,
            )
        except SaveFailedError as error:
            self._returns(pending, started, counted_s)
            return self._settle(SaveResult(error=str(error)), snapshot.step, must_hold=wait)
        except Exception:  # refused on all ranks
            self._pending = None
            raise
        if wait or self._checkpointer.blocks:
            outcome = self._await_outcome()
            self._returns(pending, started, counted_s)
            return self._settle(outcome, snapshot.step, must_hold=wait)
        self._returns(pending, started, counted_s)
        return SaveReport(snapshot.step, reason, blocking_s=pending.blocking_s, pending=True)

    def _returns(self, pending: _Pending, started: float, counted_s: float) -> None:
        """Count the time of this call, without ``counted_s``, which an earlier save was charged with."""
        pending.blocking_s = time.perf_counter() - started
        self.clock.meter.add_blocking_time(pending.blocking_s - counted_s)

    def skip(self, step: int, reason: str, why: str) -> SaveReport:
        """Leave a save out before it begins, and report that."""
        self._end_putting_off(None)
        self.clock.skipped()
        report = SaveReport(step, reason, blocking_s=0.0, skipped=why)
        self._add(report)
        return report

    def _add(self, report: SaveReport) -> None:
        self._reports.append(report)
        self.on_outcome(report)

    def events(self) -> list[SaveEvent]:
        """Return the events of saves put off since the last call."""
        events = list(self._events)
        self._events.clear()
        return events

    def outcome_alone(self) -> SaveReport | None:
        """Wait for the pending save and return its outcome as this rank knows it, or None.

        Not collective: for a loop that ends without asking the other ranks.
        """
        self._checkpointer.join()
        result = self._checkpointer.poll()
        if self._pending is None or result is None:
            return None
        return SaveReport(
            self._pending.step,
            self._pending.reason,
            blocking_s=self._pending.blocking_s,
            write_s=result.write_s,
            commit_s=result.commit_s,
            total_s=result.total_s,
            size_bytes=result.size_bytes,
            tax_is_lower_bound=True,
            skipped=result.skipped,
            error=result.error,
            warnings=tuple(result.warnings),
        )

    def wait_for_staging(self) -> None:
        """Return when tensors may be modified. The time counts as blocking."""
        if self._pending is None:
            return
        started = time.perf_counter()
        self._checkpointer.wait_for_staging()
        waited_s = time.perf_counter() - started
        self._pending.blocking_s += waited_s
        self.clock.meter.add_blocking_time(waited_s)

    def reports(self) -> list[SaveReport]:
        """Outcomes since the last call."""
        reports, self._reports = self._reports, []
        return reports

    def wait(self) -> None:
        """Wait for a pending save, without raising."""
        self._checkpointer.join()

    def close(self) -> None:
        """Finish a pending save without raising; end the writer."""
        self._checkpointer.close()

    def _await_outcome(self) -> SaveResult:
        """Return the outcome of the pending save. Collective: all ranks return together.

        The rank that hosts the store, usually the first, may end its process right after this, so all ranks
        must have read the outcome by then.
        """
        try:
            result = self._checkpointer.wait() or self._checkpointer.last_result
            result = result or SaveResult(error="it was interrupted before it began")
        except SaveFailedError as error:
            result = SaveResult(error=str(error))
        self._control.agree([0])
        return result

    def _settle(
        self, result: SaveResult, step: int, *, must_hold: bool = False, at_boundary: bool = False
    ) -> SaveReport:
        pending, self._pending = self._pending, None
        assert pending is not None
        tax = self.clock.meter.save_ended(durable_s=result.total_s, at_boundary=at_boundary)
        report = SaveReport(
            pending.step,
            pending.reason,
            blocking_s=pending.blocking_s,
            write_s=result.write_s,
            commit_s=result.commit_s,
            total_s=result.total_s,
            size_bytes=result.size_bytes,
            lag_steps=step - pending.step,
            deferred=pending.deferred,
            tax_s=tax.tax_s,
            tax_is_lower_bound=tax.is_lower_bound,
            overhead_pct=self.clock.overhead_pct,
            skipped=result.skipped,
            error=result.error,
            warnings=tuple(result.warnings),
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
        if must_hold or self._failed_in_a_row >= self._max_failed_saves:
            count = self._failed_in_a_row
            times = "1 save" if count == 1 else f"{count} saves in a row"
            raise SaveFailedError(
                f"{times} failed; the newest committed step is {self.committed_step}. {result.error}"
            )
        return report
