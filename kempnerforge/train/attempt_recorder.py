"""The record of one attempt: its rows in the ledger, and the fault file of this rank."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from kempnerforge.checkpoint.results import SaveReport
from kempnerforge.checkpoint.run import owner
from kempnerforge.checkpoint.run.attempt_start import attempt_started, start_facts
from kempnerforge.checkpoint.run.metadata import RunRecord
from kempnerforge.checkpoint.run.save_events import SaveEvent, event_of
from kempnerforge.config.schema import JobConfig
from kempnerforge.distributed.context import DistributedContext
from kempnerforge.errors import KempnerForgeError, NoProgressError, UnreachableCheckpointError
from kempnerforge.goodput import crash_loop_guard
from kempnerforge.goodput.attempt_log import AttemptLog, end_kind
from kempnerforge.goodput.faults import FaultFile, remove_empty
from kempnerforge.goodput.history import AttemptHistory
from kempnerforge.goodput.run_history import RunHistory
from kempnerforge.rank_variables import RESTART_COUNT
from kempnerforge.slurm.job import node_name


class AttemptRecorder:
    """Writes the ledger on rank 0 and a fault file on every rank. Nothing is written before ``open``."""

    def __init__(self) -> None:
        # After a restart in place, the attempt began with this process and not with its launcher.
        restarts = os.environ.get(RESTART_COUNT) or os.environ.get("TORCHELASTIC_RESTART_COUNT")
        is_restart = restarts not in (None, "0")
        started = attempt_started({}) if is_restart else attempt_started()
        self._log = AttemptLog(started, first_part="launch")
        self._faults: FaultFile | None = None
        self._history: RunHistory | None = None

    @property
    def history(self) -> RunHistory:
        """The records of the run, for its start: of earlier attempts, and the start of this one."""
        assert self._history is not None, "open comes first"
        return self._history

    def end_phase(self, part: str) -> None:
        """Record that the time since the last call was spent on ``part`` of the setup."""
        self._log.end_phase(part)

    def open(
        self,
        job: JobConfig,
        record: RunRecord,
        world: DistributedContext,
        ranks: dict[str, int],
        history: RunHistory,
        *,
        facts: Callable[[], dict[str, Any]] = dict,
    ) -> bool:
        """Begin the record of an attempt. Return whether the run has a committed step.

        On rank 0, appends the start of the attempt to ``history``. ``facts`` is called there for
        more to record of the start.

        Collective: all ranks. Durable: on return. Raises NoProgressError on all ranks when the last
        attempts of the run made no progress.
        """
        self._history = history
        control, host = world.control, node_name(os.environ)
        hosts = control.gather(host)
        folder = job.run.folder

        def begin() -> bool:
            self._remove_empty(folder, record)
            earlier = self._earlier_attempts(history, record)
            self._log.open(folder, record.attempt)
            history.append(self._log.start({**start_facts(hosts, ranks), **facts()}))
            newest = _newest_step(record.checkpoint_folder(folder), folder)
            row = crash_loop_guard.without_progress(earlier, newest_committed=newest or 0)
            why = crash_loop_guard.refusal(
                row, limit=job.run.max_faults_without_progress, run_dir=str(folder)
            )
            if why:
                raise NoProgressError(why)
            return newest is not None

        has_steps = control.run_on_rank0(begin)
        try:
            self._faults = FaultFile(
                folder,
                attempt=record.attempt,
                rank=world.rank,
                host=host,
                watchdog=world.device.type == "cuda",
            )
        except OSError as error:  # possibly on one rank only; it must not end the run
            self._log.warn(error)
        return has_steps

    def _remove_empty(self, folder: Path, record: RunRecord) -> None:
        try:
            remove_empty(folder, before_attempt=record.attempt)
        except OSError as error:
            self._log.warn(error)

    def _earlier_attempts(self, history: RunHistory, record: RunRecord) -> list[AttemptHistory]:
        """Return the earlier attempts, or none when their records cannot be read."""
        try:
            return history.attempts([(rollback.attempt, rollback.step) for rollback in record.rollbacks])
        except OSError as error:
            self._log.warn(error)
            return []

    def resumed(
        self, *, step: int, skipped: int, source: str, lost_steps: int, load_s: float, **facts: int | None
    ) -> None:
        """Record that the state is loaded and the loop begins, with ``facts`` about data and model.

        Frees the records of earlier attempts.
        """
        self.history.forget()
        self._log.resumed(
            step=step, skipped=skipped, source=source, lost_steps=lost_steps, load_s=load_s, **facts
        )

    def stepped(self, step: int, skipped: int, timings: dict[str, float]) -> None:
        """Record a finished step. ``timings`` are those of its row."""
        data_s = timings.get("time/data_s", 0.0)
        self.spent("data", data_s)
        self.spent("step", timings.get("time/step_s", 0.0) - data_s - timings.get("time/staging_s", 0.0))
        self._log.stepped(step, skipped)

    def spent(self, part: str, seconds: float) -> None:
        """Record time that the loop spent on ``part``: step, data or eval."""
        self._log.spent(part, seconds)

    def saved(self, report: SaveReport) -> None:
        """Record the outcome of a save."""
        self.record([event_of(report)])

    def record(self, events: Iterable[SaveEvent]) -> None:
        """Write events of saves and checkpoints."""
        for event in events:
            self._log.write(event.kind, **event.values)

    @property
    def fault_file(self) -> Path | None:
        """The file in which this rank records faults; None before ``open``, or if it cannot be written."""
        return self._faults.path if self._faults is not None else None

    def fault(self, error: BaseException) -> None:
        """Record an error that ends this rank. ``end`` records one that all ranks raise together."""
        agreed = isinstance(error, KempnerForgeError) and error.agreed
        if self._faults is not None and not agreed:
            try:
                self._faults.record(error)
            except OSError as write_error:
                self._log.warn(write_error)

    def end(self, *, status: int, reason: str, step: int | None, error: BaseException | None) -> None:
        """Write how the attempt ended, durably, and close the fault file of this rank."""
        kind = end_kind(status, reason, error)
        self._log.end(kind=kind, status=status, reason=reason, step=step, error=error)
        if self._faults is not None:
            self._faults.close()


def _newest_step(checkpoints: Path, folder: Path) -> int | None:
    """Return the newest committed step of the run in ``folder``, or None."""
    try:
        return owner.newest_step(checkpoints, owner.of_folder(checkpoints, folder))
    except OSError as error:
        raise UnreachableCheckpointError(
            f"{checkpoints} cannot be read: {error}. Check the file system, then start the same command again"
        ) from error
