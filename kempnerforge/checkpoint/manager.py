"""``CheckpointManager``: saves and prunes the checkpoints of a training loop, and resumes from them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from kempnerforge.checkpoint import manager_arguments
from kempnerforge.checkpoint.async_save import AsyncCheckpointer
from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.format.manifest import Provenance, current_reason
from kempnerforge.checkpoint.load.candidates import with_retries
from kempnerforge.checkpoint.load.restore import Restorer
from kempnerforge.checkpoint.results import Payload, RunContext, SaveReport
from kempnerforge.checkpoint.retention.housekeeping import Housekeeping
from kempnerforge.checkpoint.run import claim, owner
from kempnerforge.checkpoint.run.lease import Lease
from kempnerforge.checkpoint.run.own_run import OwnRun
from kempnerforge.checkpoint.run.owner import ANYONE, Owner
from kempnerforge.checkpoint.run.request_files import RequestFile, RequestFiles
from kempnerforge.checkpoint.run.resume_report import Receipt
from kempnerforge.checkpoint.run.save_events import SaveEvent
from kempnerforge.checkpoint.save.pipeline import RetryPolicy, SaveRequest
from kempnerforge.checkpoint.save_coordinator import SaveCoordinator, StepVotes
from kempnerforge.checkpoint.schedule.auto_interval import SaveIntervalController
from kempnerforge.checkpoint.schedule.save_policy import SavePolicy
from kempnerforge.checkpoint.state.train_state import TrainState
from kempnerforge.config.schema import AsyncCheckpointMode, CheckpointConfig
from kempnerforge.distributed.consensus import ControlGroup, mark_collective
from kempnerforge.errors import ConfigError, HostMemoryError, LeaseLostError, MismatchError

REQUEST = "checkpoint.request"
"""Create a file of this name in the run's folder to request a save. It is removed when the save begins."""


class CheckpointManager:
    """Saves and prunes the checkpoints of one run, and resumes from them.

    Checkpoints are written to ``config.dir``, by default ``run_dir/checkpoints``. Receipts, which
    record what each resume restored, are written to ``run_dir``. ``control_group`` is a gloo group
    that nothing else uses, or None for one process. The first rank checks ``lease`` before every
    commit. ``requests`` watches for request files in ``run_dir``.

    Without ``context`` and ``lease`` the manager itself keeps the record of the run: the lease,
    ``run.json`` and the ledger. The first collective call begins it, and raises LeaseHeldError if
    another live process writes to the run. The first rank then logs to the logger
    ``kempnerforge.checkpoint.manager`` at INFO and WARNING. Otherwise the caller keeps the record.

    As a context manager, it finishes a pending save at the end, raises SaveFailedError if that
    failed, and closes. If an exception ends the ``with``, it finishes the save too, and prints a
    failure to standard error.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        *,
        state: TrainState,
        run_dir: Path,
        control_group: dist.ProcessGroup | None = None,
        context: RunContext | None = None,
        lease: Lease | None = None,
        requests: RequestFiles | None = None,
    ) -> None:
        manager_arguments.check(config, state)
        self.config = config
        self.state = state
        self.context = context or RunContext()
        self.run_dir, self.folder = manager_arguments.folders(config, run_dir, context)
        self._owner: Owner | None = None
        """The owner of the checkpoint folder. ``_take_folder`` sets it on the first rank."""
        self._has_resumed = False
        self._control = ControlGroup(control_group)
        timeout_s = None if config.save_timeout_s == "auto" else config.save_timeout_s
        self._checkpointer = AsyncCheckpointer(
            config.async_mode,
            patience=RetryPolicy(save_timeout_s=timeout_s),
            max_host_memory_gb=config.max_host_memory_gb,
        )
        self._lease = lease
        self._housekeeping = Housekeeping(self.folder, config, run_dir=self.run_dir)
        """Has work on the first rank only."""
        self._policy = SavePolicy.from_config(config)
        self._metrics: dict[str, float] = {}
        self._metrics_step = -1
        self._requests = requests
        self._request: RequestFile | None = None
        self._saves = SaveCoordinator(
            self._checkpointer, self.folder, self._control, max_failed_saves=config.max_failed_saves
        )
        self._warnings: list[str] = []
        self._own: OwnRun | None = None
        if context is None and lease is None:
            # No reference to this manager, so that a manager that the program drops is freed.
            join = (self._checkpointer.join, self._housekeeping.close)
            self._own = OwnRun(self.run_dir, config, self._control, began_at=state.step, join=join)
            self._saves.on_report = self._record
        self._intervals = SaveIntervalController(
            config, self._saves.clock, rank=self._control.rank, ranks=self._control.num_ranks
        )

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._record_pending()
            if kind is None:
                self._checkpointer.wait()
        except BaseException as failed:
            error = failed
            raise
        finally:
            self._close(error)

    # -- resume ------------------------------------------------------------------------------------------

    def resume(self, state: TrainState) -> Receipt:
        """Load the newest sound step of this run. Without one, load ``load_path`` or begin at step 0.

        Collective: all ranks, on the control group.
        Blocks: for a pending save; until all ranks have loaded the same step.
        Mutation: fills ``state`` and this process's random number generators.
        Durable: the receipt, on return.

        Raises the same error on all ranks: NoSoundCheckpointError, UnreachableCheckpointError,
        MismatchError, StepNotFoundError, FolderOwnedError (another run owns the folder) or
        StepsMissingError (this run has committed steps, and the folder has none).
        """
        self._begin_record()
        self._control.run_on_rank0(self._take_folder)
        self._saves.wait_for_result(state.step)  # a loop may call resume again
        if self._own is not None:
            self._own.flush()  # the restore reads the ledger
        restorer = Restorer(
            self.config,
            folder=self.folder,
            run_dir=self.run_dir,
            control=self._control,
            context=self.context,
            check_lease=self._check_lease,
            owner=self._owner or ANYONE,
        )
        result = restorer.restore(state)
        self._has_resumed = True
        self._control.run_on_rank0(lambda: self._housekeeping.started(restorer.cleanup, self._steps()))
        if result.source == "resume":
            self._saves.committed_step = result.step
            self._checkpointer.link_to(self.folder / paths.step_name(result.step))
        if self._policy.plans_saves or self.config.save_last:
            result.space_warning = self._prepare_saves(state)
        if result.source == "resume" and self._control.rank == 0:
            # The last attempt may have been killed before it did this.
            self._housekeeping.committed(result.step)
        self._intervals.load_history(restorer.history, resumed_at=state.step)
        self._saves.clock.restart(state.step)
        if self._own is not None:
            self._own.resumed(result, step=state.step, skipped=state.skipped_steps)
        return result

    def _steps(self) -> list[int]:
        return with_retries(lambda: paths.list_folder(self.folder), what=str(self.folder)).steps

    def _begin_record(self) -> None:
        """Begin the record of the attempt, once, if this manager keeps it. Collective."""
        if self._own is not None and not self._own.is_open:
            self.context = self._own.open(self.state.device)
            self._lease = self._own.lease
            self.folder = self._saves.folder = self._own.checkpoints

    def _take_folder(self) -> None:
        """Take the checkpoint folder for this run, or refuse it. First rank only.

        Raises FolderOwnedError, StepsMissingError, RunFolderError, UnreachableCheckpointError.
        """
        if self._owner is None:
            run_id, history = self.context.run_id, self.context.history
            take = partial(claim.take, self.folder, run_id, self.run_dir, history=history)
            self._owner = with_retries(take, what=str(self.folder))
            self._housekeeping.move(self.folder, self._owner)

    def _prepare_saves(self, state: TrainState) -> str:
        """Plan the saves, check memory, make the host buffers, check disk space. Return a warning or ''."""
        try:
            self._checkpointer.prepare(lambda: self._capture(state), self._control.group)
        except HostMemoryError as error:  # training has not begun: the user must change the config
            raise ConfigError([error.fault]) from None
        checkpointer, newest = self._checkpointer, self._saves.committed_step
        return self._control.run_on_rank0(lambda: self._housekeeping.before_training(checkpointer, newest))

    # -- save --------------------------------------------------------------------------------------------

    def collect_votes(self, *, requested: bool = False) -> StepVotes:
        """Return this rank's votes after a step. Reduce them with MAX over all ranks for ``apply_votes``.

        ``requested``: this rank was asked to save, for example by a signal. The first rank also
        checks for the file ``checkpoint.request``. Only the first rank's clock counts.
        """
        is_first = self._control.rank == 0
        requested = requested or (is_first and self._request_file().is_there)
        bound_ms, auto_ms = self._intervals.votes()
        return StepVotes(
            requested=int(requested),
            since_save_ms=int(1000 * self._saves.clock.since_save_s) if is_first else 0,
            known_saves=self._saves.known_saves,
            lease_lost=int(self._lease is not None and bool(self._lease.lost)),
            bound_ms=bound_ms,
            auto_ms=auto_ms,
        )

    vote = collect_votes
    """Deprecated: the former name of ``collect_votes``."""

    def apply_votes(self, step: int, agreed: Sequence[int]) -> str | None:
        """Return the reason to save now, or None. ``agreed``: each vote's maximum over all ranks.

        All ranks report an earlier save that has ended. A save that is due while an earlier one is
        pending is deferred and counted. Raises on all ranks SaveFailedError after
        ``max_failed_saves`` failures in a row, LeaseLostError if another attempt took over the run.
        """
        self._begin_record()
        votes = StepVotes(*agreed)
        self._saves.clock.step_end(step)
        if votes.lease_lost:
            why = self._control.run_on_rank0(lambda: self._lease.lost if self._lease else "", brief=True)
            raise mark_collective(LeaseLostError(why))
        if self._own is not None:
            meter = self._saves.clock.meter
            skipped, waited_s = self.state.skipped_steps, meter.waited_s
            self._own.stepped(step, skipped=skipped, waited_s=waited_s, excluded_s=meter.excluded_s)
        self._saves.take_result(votes.known_saves, step=step)
        due = self._policy.due(
            step,
            seconds_since_last_save=votes.since_save_ms / 1000,
            requested=bool(votes.requested),
            bound_s=votes.bound_ms / 1000,
            auto_s=votes.auto_ms / 1000,
        )
        reason = self._saves.select(due, step)
        if self._own is not None:
            self._own.record(self.events())
            self._take_warnings()
        return reason

    decide = apply_votes
    """Deprecated: the former name of ``apply_votes``."""

    def _request_file(self) -> RequestFile:
        """Return the watched file ``checkpoint.request``. A thread checks for it. First rank only."""
        if self._request is None:
            self._requests = self._requests or RequestFiles(self.run_dir)
            self._request = self._requests.watch(REQUEST)
        return self._request

    def record_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Store metrics of ``step``. A save of this step writes them to its manifest.

        If the save has begun already, append them to ``metrics.jsonl`` in the checkpoint folder.
        Retention reads both.
        """
        if step != self._metrics_step:
            self._metrics, self._metrics_step = {}, step
        self._metrics.update(metrics)
        if self._control.rank == 0 and step == self._saves.newest_step:
            self._housekeeping.measured(step, metrics)

    def save(self, state: TrainState, *, wait: bool = False, reason: str = "requested") -> SaveReport:
        """Write ``state`` as ``step_{step:08d}`` and commit it.

        Collective: all ranks, in the same order, on the control group.
        Blocks: see ``async_mode``; with ``wait``, until an earlier save and this one have ended.
        Mutation: do not modify tensors before ``wait_for_staging`` returns.
        Durable: on return with ``wait`` or in the blocking mode, unless the report has an error.

        A failed save leaves nothing behind and is reported. SaveFailedError is raised on all ranks
        after ``max_failed_saves`` failures in a row, or at once with ``wait``. A step that is
        committed already is not written again. After the commit a background thread points
        ``latest`` to the step and deletes older steps. Only ``finish`` waits for that.
        """
        self._begin_record()
        if not self._has_resumed:
            self._control.run_on_rank0(self._take_folder)
            self._control.run_on_rank0(lambda: self._require_no_steps(state.step))
            self._has_resumed = True
        reason = current_reason(reason)
        if reason == "requested" and self._control.rank == 0:
            self._request_file().take()
        if reason == "requested" and self._own is not None and state.step == self._saves.committed_step:
            self._own.warn(f"step {state.step} is committed already and is not written again")
        skipped = ""
        if not wait:
            skipped = self._control.run_on_rank0(lambda: self._housekeeping.no_room(state.step), brief=True)
        if skipped:
            return self._saves.skip(state.step, reason, skipped)
        request = self._save_request(state, reason, wait)
        return self._saves.save(state.step, lambda: self._capture(state), request, wait=wait)

    def _require_no_steps(self, step: int) -> None:
        """Raise MismatchError if the folder has steps and this program has not called ``resume``."""
        mine = self._owner or ANYONE
        newest = with_retries(lambda: owner.newest_step(self.folder, mine), what=str(self.folder))
        if newest is not None:
            raise MismatchError(
                f"{self.folder} has steps up to {newest}, and this program is at step {step} and has not "
                "called resume(): call it before training, or pass another run_dir"
            )

    def after_step(self, state: TrainState) -> list[SaveReport]:
        """Call after every step: agree with all ranks, save if a save is due, return reports of saves.

        Collective: all ranks, in the same order, on the control group.
        Blocks, Mutation, Durable: as ``save``.
        """
        if (reason := self.apply_votes(state.step, self._control.agree(self.collect_votes()))) is not None:
            self.save(state, reason=reason)
        return self.poll()

    def _capture(self, state: TrainState) -> Payload:
        overlapping = self._checkpointer.mode is AsyncCheckpointMode.async_pinned
        return state.capture(
            rank=self._control.rank, num_ranks=self._control.num_ranks, overlapping=overlapping
        )

    def _save_request(self, state: TrainState, reason: str, wait: bool) -> SaveRequest:
        step, housekeeping = state.step, self._housekeeping
        return SaveRequest(
            provenance=Provenance(
                step=step,
                run_id=self.context.run_id,
                attempt=self.context.attempt,
                parent_step=self._saves.committed_step,
                reason=reason,
                layout=self.context.layout,
                versions=self.context.versions,
                tokenizer=self.context.tokenizer,
                metrics=self._metrics if self._metrics_step == step else {},
            ),
            config_toml=self.context.config_toml,
            before_write=lambda: housekeeping.before_write(step, must_save=wait),
            before_commit=self._check_lease,
            after_commit=lambda: housekeeping.committed(step, more_saves=not wait),
        )

    def _check_lease(self) -> None:
        if self._lease is not None:
            self._lease.check()

    def holds_lease(self) -> bool:
        """Return False if another process is known to have taken over the run, else True."""
        try:
            self._check_lease()
        except LeaseLostError:
            return False
        except OSError:
            return True
        return True

    def lease_warning(self) -> str:
        """Return why the lease cannot be renewed at present. Empty if it can be, and on all other ranks."""
        return self._lease.failing if self._lease is not None else ""

    def events(self) -> list[SaveEvent]:
        """Return ledger events since the last call: deferred saves and, on the first rank, deletions."""
        return self._saves.events() + self._housekeeping.events()

    def warnings(self) -> list[str]:
        """Return what has failed after commits since the last call, such as retention. First rank only."""
        self._take_warnings()
        warnings, self._warnings = self._warnings, []
        return warnings

    def _take_warnings(self) -> None:
        for text in self._housekeeping.warnings():
            self._warnings.append(text)
            if self._own is not None:
                self._own.warn(text)

    def _record(self, report: SaveReport) -> None:
        """Log and record the report of a save."""
        if self._own is not None:
            self._own.record(self._saves.events())
            self._own.saved(report, self.folder / paths.step_name(report.step))
            self._own.record(self.events())

    def _record_pending(self) -> None:
        """Record the outcome of a pending save without agreement of the other ranks."""
        if self._own is not None and self._own.is_open and (report := self._saves.local_report()) is not None:
            self._record(report)

    @property
    def in_flight(self) -> tuple[str, str, float] | None:
        """Name of the pending save, what this rank does for it, and its age in seconds. Any thread."""
        return self._checkpointer.in_flight

    @property
    def deferred_save(self) -> str | None:
        """Why a save is due that waits for the end of the pending one. None without such a save."""
        return self._saves.deferred_reason

    def kill_writer(self) -> None:
        """Kill the writer process. For a process that is about to end. Any thread."""
        if (pid := self._checkpointer.writer_pid) is not None:
            os.kill(pid, signal.SIGKILL)

    def wait_for_staging(self) -> None:
        """Call before ``optimizer.step()``. Return when tensors may be modified.

        Not collective. Blocks: until the copy is done. On CUDA the device waits, not the host.
        """
        self._saves.wait_for_staging()

    def poll(self) -> list[SaveReport]:
        """Return reports of saves whose outcome all ranks know, since the last call. Never blocks.

        The last report has the warnings. If there are warnings but no report, call ``warnings()``.
        """
        reports = self._intervals.with_interval(self._saves.reports())
        self._take_warnings()
        if reports and self._warnings:
            reports[-1] = replace(reports[-1], warnings=(*reports[-1].warnings, *self.warnings()))
        if self._own is not None:
            self._own.paced(self._intervals.status_message())
        return reports

    def status_message(self) -> str:
        """Return a message if the save interval has changed since the last call. First rank only."""
        if self._own is None:
            return self._intervals.status_message()
        message, self._own.news = self._own.news, ""
        return message

    news = status_message
    """Deprecated: the former name of ``status_message``."""

    def exclude_time(self, seconds: float) -> None:
        """Exclude ``seconds`` of work between steps, such as validation, from the measured cost of saves."""
        self._saves.clock.meter.exclude_time(seconds)

    leave_out = exclude_time
    """Deprecated: the former name of ``exclude_time``."""

    def finish(self, state: TrainState, *, give_up: Callable[[], bool] = lambda: False) -> None:
        """Wait for a pending save. With ``save_last``, commit the last step unless it is committed.

        Collective: all ranks, on the control group.
        Blocks: until the commit; the first rank also until older steps are deleted, for 60 s at
        most or until ``give_up`` returns True.
        Durable: on return.
        Raises SaveFailedError on all ranks.
        """
        self._saves.wait_for_result(state.step)
        if self.config.save_last and state.step > 0:
            self.save(state, wait=True, reason="last")
        self._housekeeping.finish(give_up=give_up)
        self._take_warnings()
        if self._own is not None:
            if state.step == 0:
                self._own.warn("nothing was saved: the step is 0. Call state.advance() after every step")
            self._own.finished(state.step)

    def wait(self) -> None:
        """Wait for a pending save without raising. Not collective. May be called after an error."""
        self._saves.wait()

    def end_housekeeping(self) -> None:
        """Stop the work that follows commits. The next start of the run does the rest. Not collective."""
        self._saves.wait()
        self._housekeeping.close()
        self._take_warnings()

    def close(self) -> None:
        """Finish a pending save without raising, end the writer, release the lease. Not collective."""
        self._record_pending()
        self._close(None)

    def _close(self, error: BaseException | None) -> None:
        """Close. ``error``: the exception that ended the loop, if any."""
        self.end_housekeeping()
        self._saves.close()
        if self._requests is not None:
            self._requests.close()
        if self._own is not None:
            self._own.record(self.events())
            self._own.end(error)
        if self._lease is not None:
            self._lease.release()
