"""Keep the record of a run with the user's own loop: lease, ``run.json``, ledger and log lines.

``scripts/train.py`` keeps this record itself. In a user's own loop, a ``CheckpointManager`` without
a context keeps it with this module, so that ``kempnerforge report`` and ``kempnerforge ckpt`` work
for such a run too.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from kempnerforge.checkpoint.results import RunContext, SaveReport
from kempnerforge.checkpoint.run.attempt_start import OpenOptions, attempt_started, open_run, start_facts
from kempnerforge.checkpoint.run.claim import Hints
from kempnerforge.checkpoint.run.lease import Lease
from kempnerforge.checkpoint.run.resume_report import Receipt
from kempnerforge.checkpoint.run.save_events import SaveEvent, event_of
from kempnerforge.checkpoint.run.versions import versions
from kempnerforge.config.schema import CheckpointConfig
from kempnerforge.config.toml_text import render
from kempnerforge.distributed.consensus import ControlGroup
from kempnerforge.errors import EXIT_FAULT, EXIT_FINISHED, EXIT_STOPPED, KempnerForgeError
from kempnerforge.goodput.attempt_log import AttemptLog, end_kind
from kempnerforge.goodput.event_log import OWN_LOOP
from kempnerforge.goodput.faults import record_fault
from kempnerforge.slurm.job import node_name

log = logging.getLogger("kempnerforge.checkpoint.manager")
"""Named after the manager, which users know. Only the first rank logs. The program sets the handlers."""

OPTIONS = OpenOptions(
    folder_name="run_dir",
    other_folder="run_dir to SHARED/PATH",
    rename_hint="give this run another run_dir",
    adopt=True,
    checkpoints=Hints("give this run another run_dir", 'CheckpointConfig(dir="{parent}/{{run_name}}")'),
)

_attempts: dict[str, _Attempt] = {}
"""Open attempts of this process, by the real path of the run's folder."""
_processes_begun: set[int] = set()
"""Ids of processes that have started an attempt. The time before the first one counts as its setup."""


Join = Sequence[Callable[[], None]]


class _Attempt:
    """The lease and the ledger of an open attempt, on the first rank. ``end`` releases them, once."""

    def __init__(self, key: str, lease: Lease, ledger: AttemptLog, join: Join) -> None:
        self._key = key
        self.join = join
        """Functions that wait for a pending save and what follows it."""
        self.lease = lease
        self.ledger = ledger
        self.step: int | None = None
        self.pid = os.getpid()
        self.is_over = False

    def end(self, *, status: int, reason: str, error: BaseException | None = None) -> None:
        """Write how the attempt ended and release the lease."""
        is_copy = self.pid != os.getpid()  # in a forked child; the parent holds the lease
        if self.is_over or is_copy:
            return
        self.is_over = True
        _attempts.pop(self._key, None)
        kind = end_kind(status, reason, error)
        self.ledger.end(kind=kind, status=status, reason=reason, step=self.step, error=error)
        self.lease.release()
        level = logging.INFO if kind in ("finished", "stopped") else logging.WARNING
        log.log(level, "attempt %d: %s", self.lease.attempt, reason)

    def drop(self) -> None:
        """End an attempt that was not finished and not closed."""
        self.end(status=EXIT_STOPPED, reason=f"ended{self.where} without finish()")

    @property
    def where(self) -> str:
        """The step for messages; empty before the first."""
        return f" at step {self.step}" if self.step is not None else ""


@atexit.register
def _end_all() -> None:
    """End open attempts when the interpreter exits. Python has joined the save threads by then."""
    error = None if hasattr(sys, "ps1") else getattr(sys, "last_value", None)
    for attempt in list(_attempts.values()):
        if error is not None:
            attempt.end(status=_status_of(error), reason=_words(error), error=error)
        else:
            attempt.drop()


class OwnRun:
    """Keeps the record of one attempt. Only the first rank holds the lease and writes the ledger.

    ``began_at``: the step at which a loop without a resume starts. ``join``:
    functions that wait for a pending save and what follows it. They must not refer to the manager.
    """

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        control: ControlGroup,
        *,
        began_at: int,
        join: Join,
    ) -> None:
        self._join = join
        self._run_dir = run_dir
        self._config = config
        self._control = control
        self._began_at = began_at
        self._attempt: _Attempt | None = None
        self._number = 0
        self._has_resumed = False
        self._boundary = self._waited_s = self._excluded_s = 0.0
        self._lease_failing = ""
        self._finished_at: int | None = None
        self.lease: Lease | None = None
        """On the first rank, from ``open`` on."""
        self.checkpoints = run_dir / "checkpoints"
        """From ``open`` on: the checkpoint folder, without placeholders."""
        self.news = ""
        """The last change of the save interval that ``CheckpointManager.news`` has not returned yet."""

    @property
    def is_open(self) -> bool:
        """Whether ``open`` was called. The same on all ranks."""
        return self._number > 0

    def open(self, device: torch.device | None) -> RunContext:
        """Start an attempt: take the lease, count the attempt in ``run.json``, start its part of the ledger.

        Checkpoints of a version that wrote no ``run.json`` are adopted. Ends an attempt that
        another manager of this process has left open in the folder.

        Collective: all ranks. Blocks: while it watches another process's lease. Durable: on return.
        Raises on all ranks RunFolderError, LeaseHeldError if another process writes to the run,
        FolderOwnedError if the checkpoint folder is another run's, StepsMissingError if this run
        has committed steps but none is there.
        """
        key = os.path.realpath(self._run_dir)
        older = _attempts.get(key)  # always None except on the first rank
        if older is not None and older.pid == os.getpid():
            for wait in older.join:
                wait()
            older.lease.lost = "another CheckpointManager of this process has taken the run over"
            older.end(status=EXIT_STOPPED, reason=older.lease.lost)
        started = time.time() if os.getpid() in _processes_begun else attempt_started()
        _processes_begun.add(os.getpid())
        hosts = self._control.gather(node_name(os.environ))
        ledger = AttemptLog(started, first_part="program")
        record, lease = open_run(
            self._run_dir,
            self._control,
            first_global_batch_size=0,
            checkpoint_dir=self._config.dir,
            options=OPTIONS,
        )
        self._number = record.attempt
        self.checkpoints = record.checkpoint_folder(self._run_dir)
        ranks = {"num_ranks": self._control.num_ranks}
        if lease is not None:
            self.lease = lease
            self._attempt = _attempts[key] = _Attempt(key, lease, ledger, self._join)
            weakref.finalize(self, self._attempt.drop).atexit = False
            ledger.open(self._run_dir, record.attempt)
            ledger.write("start", process_started=started, **start_facts(hosts, ranks), loop=OWN_LOOP)
            ledger.flush()
            ledger.end_phase("folder")
            log.info("run %s, attempt %d, in %s", record.run_id, record.attempt, self._run_dir)
        self._boundary = time.perf_counter()
        config_toml = render({"checkpoint": self._config.model_dump(mode="json")})
        return RunContext(
            run_id=record.run_id,
            attempt=record.attempt,
            layout=ranks,
            versions=versions(device or torch.device("cpu")),
            config_toml=config_toml,
        )

    def flush(self) -> None:
        """Wait until the ledger is written. Do not call this in the loop."""
        if self._attempt is not None:
            self._attempt.ledger.flush()

    def resumed(self, receipt: Receipt, *, step: int, skipped: int) -> None:
        """Log and record that the attempt starts after ``step``.

        ``skipped``: steps skipped so far because of values that were not finite.
        """
        for line in receipt.lines():
            self._info(line)
        if receipt.space_warning:
            self.warn(receipt.space_warning)
        self._begin_loop(step, skipped, receipt.source, lost_steps=receipt.lost_steps, load_s=receipt.load_s)

    def _begin_loop(
        self, step: int, skipped: int, source: str, *, lost_steps: int = 0, load_s: float = 0.0
    ) -> None:
        self._has_resumed = True
        self._boundary, self._waited_s, self._excluded_s = time.perf_counter(), 0.0, 0.0
        if self._attempt is not None:
            self._attempt.step = step
            self._attempt.ledger.resumed(
                step=step, skipped=skipped, source=source, lost_steps=lost_steps, load_s=load_s
            )

    def stepped(self, step: int, *, skipped: int, waited_s: float, excluded_s: float) -> None:
        """Record that ``step`` is done.

        ``waited_s`` and ``excluded_s``: total seconds that the loop has waited for saves, and
        excluded from its steps. The rest of the time since the last call counts as step time.
        """
        if not self._has_resumed:
            self._begin_loop(min(self._began_at, step), skipped, "not resumed")
        now = time.perf_counter()
        left_out_s = excluded_s - self._excluded_s
        step_s = now - self._boundary - (waited_s - self._waited_s) - left_out_s
        self._boundary, self._waited_s, self._excluded_s = now, waited_s, excluded_s
        self._finished_at = None
        if self._attempt is None:
            return
        self._attempt.step = step
        self._attempt.ledger.spent("step", max(0.0, step_s))
        if left_out_s:
            self._attempt.ledger.spent("eval", left_out_s)
        self._attempt.ledger.stepped(step, skipped)

    def saved(self, report: SaveReport, folder: Path) -> None:
        """Log and record the outcome of a save."""
        self.record([event_of(report)])
        if report.skipped:
            self.warn(report.skipped)
        elif report.error:
            self.warn(f"the save of step {report.step} failed: {report.error}")
        else:
            steps = "step" if report.deferred == 1 else "steps"
            late = f", put off by {report.deferred} {steps}" if report.deferred else ""
            self._info(
                f"step {report.step} is committed ({report.reason}{late}): {report.size_bytes / 1e6:.1f} MB "
                f"in {report.total_s:.2f} s, of which training waited {report.blocking_s:.2f} s, in {folder}"
            )
        for warning in report.warnings:
            self.warn(warning)
        failing = self.lease.failing if self.lease is not None else ""
        if failing and failing != self._lease_failing:
            self.warn(f"the lease of this run cannot be renewed: {failing}")
        self._lease_failing = failing

    def record(self, events: Iterable[SaveEvent]) -> None:
        """Write events to the ledger, and log those that no report covers."""
        for event in events:
            if self._attempt is not None:
                self._attempt.ledger.write(event.kind, **event.values)
            values = event.values
            if event.kind == "put_off" and values["to_step"] is None:
                step, writing = values["from_step"], values["writing"]
                self._info(f"save of step {step} put off: step {writing} is still being written")
            elif event.kind == "deleted":
                word = "step" if len(values["steps"]) == 1 else "steps"
                self._info(f"deleted {word} {', '.join(map(str, values['steps']))}: no rule keeps more")

    def paced(self, news: str) -> None:
        """Log a change of the save interval. Do nothing if ``news`` is empty."""
        if news:
            self.news = news
            self._info(news)

    def finished(self, step: int) -> None:
        """Store that the loop has finished, for ``end`` to record."""
        self._finished_at = step

    def end(self, error: BaseException | None) -> None:
        """Record how the attempt ended, with ``error`` if there was one, and release the lease."""
        if self._control.rank != 0 and error is not None and self.is_open:
            agreed = isinstance(error, KempnerForgeError) and error.agreed
            if not agreed:
                self._record_fault(error)
        if self._attempt is None:
            return
        if error is None and self._finished_at is not None:
            self._attempt.end(status=EXIT_FINISHED, reason=f"finished at step {self._finished_at}")
        elif error is None:
            self._attempt.end(status=EXIT_STOPPED, reason=f"closed{self._attempt.where} without finish()")
        else:
            self._attempt.end(status=_status_of(error), reason=_words(error), error=error)

    def _record_fault(self, error: BaseException) -> None:
        """Record an error of this rank. The first rank may see only a lost connection."""
        with contextlib.suppress(OSError):  # the error itself is raised anyway
            record_fault(
                self._run_dir,
                error,
                attempt=self._number,
                rank=self._control.rank,
                host=node_name(os.environ),
            )

    def _info(self, text: str) -> None:
        if self._control.rank == 0:
            log.info("%s", text)

    def warn(self, text: str) -> None:
        """Log a warning, on the first rank."""
        if self._control.rank == 0:
            log.warning("%s", text)


def _status_of(error: BaseException) -> int:
    """Return the exit status for an error."""
    if isinstance(error, KempnerForgeError):
        return error.exit_status
    if isinstance(error, SystemExit):
        return EXIT_STOPPED if error.code in (None, EXIT_FINISHED, EXIT_STOPPED) else EXIT_FAULT
    return EXIT_STOPPED if isinstance(error, KeyboardInterrupt) else EXIT_FAULT


def _words(error: BaseException) -> str:
    """Return the text of an error for the end of an attempt."""
    if isinstance(error, KempnerForgeError):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
