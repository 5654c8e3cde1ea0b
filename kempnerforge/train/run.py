"""One attempt from start to exit status."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from pathlib import Path

import torch

from kempnerforge import log_setup
from kempnerforge.config.schedule_changes import when_continued
from kempnerforge.config.schema import JobConfig, LoadedJob
from kempnerforge.distributed.context import DistributedContext, find_rank_info
from kempnerforge.errors import (
    EXIT_FAULT,
    EXIT_FINISHED,
    EXIT_STOPPED,
    ConfigError,
    KempnerForgeError,
    RunFolderError,
    StopRequestedError,
)
from kempnerforge.goodput.faults import is_peer_loss
from kempnerforge.log_setup import LogHandler
from kempnerforge.telemetry.console import ConsoleSink
from kempnerforge.train.attempt_recorder import AttemptRecorder
from kempnerforge.train.environment import keep_freed_memory, raise_open_file_limit, set_determinism
from kempnerforge.train.hangs.run_watch import watched
from kempnerforge.train.hangs.stack_dump import Stacks
from kempnerforge.train.loop import train
from kempnerforge.train.out_of_memory import explain
from kempnerforge.train.run_dir import record_exit, storage_error
from kempnerforge.train.setup import Run, build
from kempnerforge.train.termination.signals import StopSignals
from kempnerforge.train.termination.stop_conditions import StopConditions
from kempnerforge.train.termination.watchdog import Shutdown

log = logging.getLogger(__name__)


def run_job(loaded: LoadedJob, signals: StopSignals) -> int:
    """Train the job of ``loaded``, or resume it. Returns the exit status.

    ``signals`` are installed already. A KempnerForgeError, or an error of the run's file system, is
    printed without a traceback. Any other exception is a fault and is raised.

    Collective: all ranks.
    """
    job, rank = loaded.job, find_rank_info().rank
    level = log_setup.level_from(os.environ)
    console = None
    if rank == 0:
        # Debug lines go to standard error, which on a terminal would overwrite the progress line.
        has_line = level > logging.DEBUG
        console = ConsoleSink(job.train.max_steps, job.metrics.log_interval, has_progress_line=has_line)
    handler = LogHandler(level, rank=rank, console=console, warning_head="warning: ")
    with log_setup.shown_by(handler):
        return _run(job, signals, console, handler)


def _run(job: JobConfig, signals: StopSignals, console: ConsoleSink | None, handler: LogHandler) -> int:
    recorder = AttemptRecorder()
    failed: Exception | None = None
    stacks = Stacks(find_rank_info().rank)
    shutdown = Shutdown(signals, timeout_s=job.train.shutdown_timeout_s, stacks=stacks)
    stopping = StopConditions(signals, shutdown, stacks)
    set_determinism(job.train.deterministic)
    keep_freed_memory()
    raise_open_file_limit()
    world: DistributedContext | None = None
    run: Run | None = None
    status, reason = EXIT_FAULT, "unknown"
    try:
        world = DistributedContext.start(timeout_s=job.distributed.timeout_s)
        recorder.end_phase("process_groups")
        run = build(job, world, stopping, recorder, console)
        shutdown.on_exit = lambda why, run=run: _end_at_once(run, why, handler)
        with watched(run):
            stop = train(run)
        status, reason = EXIT_FINISHED if stop is None else EXIT_STOPPED, _exit_message(run, stop)
        log.info(reason)
        return status
    except Exception as error:
        failed = error
        recorder.fault(error)
        if run is not None and isinstance(error, torch.OutOfMemoryError):
            _explain_memory(run)
        reported = (
            error
            if isinstance(error, KempnerForgeError)
            else storage_error(error, _folders(job, run)) or _peer_loss(error, recorder.fault_file)
        )
        if reported is None:
            reason = f"{type(error).__name__}: {error}"
            raise
        _log_error(reported, world)
        status, reason = reported.exit_status, str(reported)
        return status
    finally:
        if run is not None:
            run.ckpt.end_housekeeping()
            run.recorder.record(run.ckpt.events())
            for warning in run.ckpt.warnings():
                log.warning(warning)
            _record(run, status, reason)
        recorder.end(status=status, reason=reason, step=run.state.step if run else None, error=failed)
        if run is not None:
            run.ckpt.close()
            run.reports.close()
        if world is not None and status in (EXIT_FINISHED, EXIT_STOPPED):
            world.close()
        stopping.close()


def _explain_memory(run: Run) -> None:
    """Log what holds the device memory of this rank."""
    attempt, rank = run.ckpt.context.attempt, run.world.rank
    line = explain(run.memory_holders, run.world.device, run_dir=run.folder, attempt=attempt, rank=rank)
    log.error(line)


def _folders(job: JobConfig, run: Run | None) -> list[Path]:
    """Return the folders of the run, as far as they are known."""
    if run is not None:
        return [run.folder, run.ckpt.folder]
    folders = [Path(job.checkpoint.dir.partition("{")[0])] if job.checkpoint.dir is not None else []
    with contextlib.suppress(ConfigError):  # a placeholder without a value, which is reported elsewhere
        folders.append(job.run.folder)
    return folders


def _peer_loss(error: Exception, fault_file: Path | None) -> KempnerForgeError | None:
    """Convert the loss of another rank into an error of one line; None for any other error.

    The other rank names the cause. The stack of this one is in its fault file.
    """
    if not is_peer_loss(type(error).__name__, str(error)):
        return None
    first_sentence = re.split(r"\.\s|\n", str(error), maxsplit=1)[0]
    stack = f" (stack in {fault_file})" if fault_file is not None else ""
    return KempnerForgeError(f"lost another rank: {first_sentence}{stack}")


def _log_error(error: KempnerForgeError, world: DistributedContext | None) -> None:
    """Log an error. Rank 0 alone logs one that all ranks raise together."""
    rank = world.rank if world is not None else 0
    if rank == 0:
        head = "" if isinstance(error, StopRequestedError) else "error: "
        log.error(f"{head}{error}")
    elif not error.agreed:
        log.error(f"error on rank {rank}: {error}")


def _record(run: Run, status: int, reason: str) -> None:
    """Write how the attempt ended to ``run.json``, which belongs to this attempt while it holds the lease.

    A failure to write it is only a warning, because it does not change how the attempt ends.
    """
    if run.world.rank == 0 and run.ckpt.holds_lease():
        try:
            record_exit(run.folder, status=status, reason=reason, step=run.state.step)
        except (OSError, RunFolderError) as error:
            log.warning(f"how this attempt ended is not recorded in {run.folder}: {error}")


def _end_at_once(run: Run, why: str, handler: LogHandler) -> None:
    """Record the exit, on a thread, just before the process ends while its main thread is stuck."""
    handler.write_directly()
    run.ckpt.kill_writer()
    reason = f"{why}: ended at once at step {run.state.step}, which may not be committed"
    _record(run, EXIT_STOPPED, reason)
    run.recorder.end(status=EXIT_STOPPED, reason=reason, step=run.state.step, error=None)


def _exit_message(run: Run, stop: str | None) -> str:
    step = run.state.step
    if stop is not None:
        return f"stopped by {stop} at step {step}, which is committed. Run the same command to resume"
    losses = ""
    if len(run.eval_losses) > 1:
        (first_step, first), (_, last) = run.eval_losses[0], run.eval_losses[-1]
        losses = f" Validation loss {first:.4f} at step {first_step}, {last:.4f} now."
    if run.used_up:
        return (
            f'finished at step {step}: source "{run.used_up}" is used up.{losses} Files: {run.folder}. '
            f'To train further, set its when_used_up = "repeat", or leave it out from step {step} on '
            "([[data.phases]]), and run the same command"
        )
    job = run.job
    schedule_note = when_continued(
        job.scheduler, base_lr=job.optimizer.lr, max_steps=job.train.max_steps, until=2 * step
    )
    return (
        f"finished at step {step}.{losses} Files: {run.folder}. To train further, run the same command with "
        f"--train.max_steps={2 * step}{f' ({schedule_note})' if schedule_note else ''}"
    )
