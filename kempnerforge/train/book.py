"""The record of one attempt: what goes into the ledger, and the file for this rank's own faults."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from kempnerforge.checkpoint import layout
from kempnerforge.checkpoint.report import SaveReport
from kempnerforge.checkpoint.run_record import RunRecord
from kempnerforge.config.schema import JobConfig
from kempnerforge.distributed.world import World
from kempnerforge.errors import (
    EXIT_BAD_CONFIG,
    EXIT_FINISHED,
    EXIT_NO_PROGRESS,
    EXIT_STOPPED,
    KempnerForgeError,
    NoProgressError,
)
from kempnerforge.goodput import breaker
from kempnerforge.goodput.faults import FaultFile, is_peer_loss, remove_empty
from kempnerforge.goodput.history import read_history
from kempnerforge.goodput.ledger import Ledger
from kempnerforge.slurm.job import node_name, restart_count
from kempnerforge.train.stop_file import attempt_started

_SPACING = 0.02
_MIN_SPACING_S, _MAX_SPACING_S = 0.05, 10.0


class AttemptBook:
    """Rank 0 writes the ledger; every rank has a file for its faults. Nothing is written before ``open``."""

    def __init__(self) -> None:
        # Ranks that torchrun starts again are not as old as it is.
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        self._started = attempt_started({}) if again else attempt_started()
        self._lap = time.perf_counter()
        self._setup_s: dict[str, float] = {"launch": max(0.0, time.time() - self._started)}
        self._spent_s: dict[str, float] = {}
        self._ledger: Ledger | None = None
        self._faults: FaultFile | None = None
        self._healthy_from: tuple[int, int] | None = None
        self._loop_began = self._told = 0.0
        self._warned = False

    def lap(self, part: str) -> None:
        """The time since the last lap was spent on ``part`` of the set-up."""
        now = time.perf_counter()
        self._setup_s[part] = self._setup_s.get(part, 0.0) + now - self._lap
        self._lap = now

    def open(self, job: JobConfig, record: RunRecord, world: World, ranks: dict[str, int]) -> bool:
        """Begin the record of an attempt; refuse it when the run makes no progress.

        Returns whether the run has a committed step.

        Collective: all ranks. Durable: on return. Raises NoProgressError on all ranks.
        """
        control, host = world.control, node_name(os.environ)
        hosts = control.gather(host)
        folder = job.run.folder

        def begin() -> bool:
            remove_empty(folder, before_attempt=record.attempt)
            rollbacks = [one.attempt for one in record.rollbacks]
            history = read_history(folder, rollbacks=rollbacks)
            self._ledger = Ledger(folder, record.attempt)
            self._ledger.write(
                "start",
                process_started=self._started,
                hosts=hosts,
                slurm_job_id=os.environ.get("SLURM_JOB_ID", ""),
                slurm_restart_count=restart_count(os.environ),
                layout=ranks,
            )
            committed = layout.committed_steps(record.checkpoint_folder(folder))
            row = breaker.without_progress(history, newest_committed=max(committed, default=0))
            why = breaker.refusal(row, limit=job.run.max_faults_without_progress, run_dir=str(folder))
            if why:
                raise NoProgressError(why)
            return bool(committed)

        has_steps = control.on_rank0(begin)
        try:
            self._faults = FaultFile(
                folder,
                attempt=record.attempt,
                rank=world.rank,
                host=host,
                watchdog=world.device.type == "cuda",
            )
        except OSError as error:  # on one rank alone, perhaps: no reason to end it, and so all of them
            self._warn(error)
        return has_steps

    def resumed(self, *, step: int, skipped: int, source: str, lost_steps: int, load_s: float) -> None:
        """The state is loaded and the loop begins."""
        self.lap("resume")
        self._healthy_from = (step, skipped)
        self._loop_began = self._told = time.perf_counter()
        self._write(
            "resume", step=step, source=source, lost_steps=lost_steps, load_s=load_s, setup_s=self._setup_s
        )

    def stepped(self, step: int, skipped: int, timings: dict[str, float]) -> None:
        """A step is done. ``timings`` are those of its row. Summaries miss 2% of an attempt, 10 s at most."""
        data_s = timings.get("time/data_s", 0.0)
        self.spent("data", data_s)
        self.spent("step", timings.get("time/step_s", 0.0) - data_s - timings.get("time/staging_s", 0.0))
        if self._healthy_from is not None:
            began, before = self._healthy_from
            if step - began - (skipped - before) >= breaker.HEALTHY_STEPS:
                self._healthy_from = None
                self._write("healthy", step=step)
        now = time.perf_counter()
        pause_s = min(max(_SPACING * (now - self._loop_began), _MIN_SPACING_S), _MAX_SPACING_S)
        if now - self._told >= pause_s:
            self._told = now
            self._write("progress", step=step, spent_s=self._spent_s)

    def spent(self, part: str, seconds: float) -> None:
        """Time of the loop that went into ``part``: step, data or eval."""
        self._spent_s[part] = self._spent_s.get(part, 0.0) + seconds

    def saved(self, report: SaveReport) -> None:
        """The outcome of a save is known."""
        if not report.error and not report.skipped:
            names = ("step", "reason", "blocking_s", "write_s", "commit_s", "total_s", "size_bytes")
            tax_s = None if report.tax_is_lower_bound else report.tax_s
            self._write("commit", **{name: getattr(report, name) for name in names}, tax_s=tax_s)

    def fault(self, error: BaseException) -> None:
        """An error ends this rank. What all ranks raise together, rank 0 tells in the end alone."""
        agreed = isinstance(error, KempnerForgeError) and error.agreed
        if self._faults is not None and not agreed:
            try:
                self._faults.record(error)
            except OSError as failed:
                self._warn(failed)

    def end(self, *, status: int, reason: str, step: int | None, error: BaseException | None) -> None:
        """Write how the attempt ended, durably, and close this rank's file."""
        told = {"kind": end_kind(status, reason, error), "status": status, "reason": reason}
        self._write("end", **told, step=step, spent_s=self._spent_s)
        if self._faults is not None:
            self._faults.close()

    def _write(self, event: str, **values: Any) -> None:
        if self._ledger is None:
            return
        try:
            self._ledger.write(event, **values)
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        """A full disk costs part of the record, never the run. Told once."""
        if not self._warned:
            self._warned = True
            print(
                f"warning: the record of this attempt is not complete: {error}", file=sys.stderr, flush=True
            )


def end_kind(status: int, reason: str, error: BaseException | None) -> str:
    """Which kind of end it was, of ``goodput.history.KINDS``. Pure."""
    if error is not None and is_peer_loss(type(error).__name__, str(error)):
        return "lost"
    if status == EXIT_STOPPED:
        return "deadline" if "deadline" in reason else "stopped"
    kinds = {EXIT_FINISHED: "finished", EXIT_BAD_CONFIG: "config", EXIT_NO_PROGRESS: "blocked"}
    return kinds.get(status, "fault")
