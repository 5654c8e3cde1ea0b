"""The training loop. It is the same on all ranks and in all layouts: ``setup.build`` handles the rest."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from typing import Any

from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.run.resume_report import Receipt
from kempnerforge.config.scheduler import lr_at
from kempnerforge.data.loader import Cursor
from kempnerforge.distributed.consensus import mark_collective
from kempnerforge.errors import ConfigError, DataError, NonFiniteError, RunFolderError
from kempnerforge.telemetry.flops import mfu
from kempnerforge.telemetry.sinks import RunInfo
from kempnerforge.telemetry.spans import Spans
from kempnerforge.train.evaluation import validation_losses
from kempnerforge.train.hooks import TrainInfo
from kempnerforge.train.mixture_run import samples_per_epoch, source_rows, step_rows, weighted_loss
from kempnerforge.train.setup import Run
from kempnerforge.train.step import UpdateResult
from kempnerforge.train.step_consensus import StepDecision

log = logging.getLogger(__name__)


def train(run: Run) -> str | None:
    """Resume, then train until ``max_steps`` or until all ranks agree to stop.

    Collective: all ranks. Returns why it stopped before ``max_steps``, or None when it is finished.
    """
    state, step, ckpt, reports = run.state, run.step, run.ckpt, run.reports
    receipt = _resume(run)
    job = run.job
    reports.receipt(dataclasses.asdict(receipt))
    run.recorder.resumed(
        step=state.step,
        skipped=state.skipped_steps,
        source=receipt.source,
        lost_steps=receipt.lost_steps,
        load_s=receipt.load_s,
        train_samples=samples_per_epoch(run.train_samples),
        parameters=run.num_parameters,
    )
    replay_check = reports.replay_check(receipt)
    _start_plugins(run)
    stop = _save_if_agreed(run).stop if state.step == 0 else _stop_if_agreed(run)
    if stop is None and (state.step == 0 or _lacks_validation(run, receipt)):
        stop = _validate(run)
    spans = Spans(run.world.device.type, on_enter=run.progress.phase)
    batches = run.batches()
    try:
        while stop is None and state.step < job.train.max_steps:
            run.progress.begin("step", state.step + 1)
            with spans.span("step", host=True):
                with spans.span("data", host=True):
                    batch, cursor = next(batches)
                with spans.span("forward_backward"):
                    step.forward_backward(batch)
                with spans.span("staging", host=True):
                    ckpt.wait_for_staging()
                lr = _learning_rate(run)
                with spans.span("optimizer"):
                    update = step.update(lr)
                num_tokens = update.count(batch)
                state.advance(tokens=num_tokens, cursor=cursor, skipped=update.skipped)
            ckpt.record_metrics(state.step, {"train/loss": update.loss})
            if message := replay_check.compare(state.step, update.loss):
                log.info(message)
            timings = spans.collect()
            run.recorder.stepped(state.step, state.skipped_steps, timings)
            reports.write(row := _row(run, update, lr, num_tokens, batch.digest, timings))
            run.control.hooks.step_end(state.step, row)
            _check_skipped_steps(run, num_tokens)
            stop = _save_if_agreed(run).stop
            if stop is None and _validation_is_due(run):
                stop = _validate(run)
    finally:
        batches.close()
    run.control.profiler.finish(state.step)
    if state.step < job.train.max_steps:
        _log_margin(run)
        run.control.hooks.train_end(state.step, str(stop))
        return stop
    run.progress.begin("save", state.step)
    ckpt.finish(state, give_up=lambda: bool(run.control.stopping.signals.received))
    _report_saves(run)
    run.control.hooks.train_end(state.step, "finished")
    return None


def _resume(run: Run) -> Receipt:
    """Resume, and say so. The data may not be enough for all steps that are left. Collective: all ranks."""
    receipt = run.ckpt.resume(run.state)
    run.end_with_data()
    if not run.has_weights and receipt.source != "resume":
        raise mark_collective(
            RunFolderError(f"{run.ckpt.folder}: its committed steps disappeared during the start")
        )
    for line in receipt.lines():
        log.info(line)
    if receipt.space_warning:
        log.warning(receipt.space_warning)
    return receipt


def _start_plugins(run: Run) -> None:
    """Tell the sinks and the hooks of the config where training begins."""
    context, world = run.ckpt.context, run.world
    info: dict[str, Any] = {
        "job": run.job,
        "run_dir": run.folder,
        "run_id": context.run_id,
        "attempt": context.attempt,
        "step": run.state.step,
        "rank": world.rank,
        "num_ranks": world.num_ranks,
    }
    run.reports.start(RunInfo(**info))
    run.control.hooks.train_start(TrainInfo(**info, model=run.model))


def _learning_rate(run: Run) -> float:
    """Return the learning rate of the next step. A schedule of the user's raises on all ranks alike."""
    job = run.job
    try:
        return lr_at(run.state.step, job.scheduler, base_lr=job.optimizer.lr, max_steps=job.train.max_steps)
    except ConfigError as error:
        raise mark_collective(error) from error


def _validation_is_due(run: Run) -> bool:
    """Return whether to validate the current step: every ``eval.interval`` steps, and the last one."""
    step, interval = run.state.step, run.job.eval.interval
    return bool(interval) and (step % interval == 0 or step == run.job.train.max_steps)


def _lacks_validation(run: Run, receipt: Receipt) -> bool:
    """Return whether an earlier attempt ended before it validated the step that this one resumes from.

    Only the first attempt that resumes from the step repeats the validation, so that a validation
    that never ends cannot keep the run from training. Collective: all ranks.
    """
    if receipt.source != "resume" or not _validation_is_due(run):
        return False
    return run.world.control.run_on_rank0(lambda: run.reports.lacks_validation(receipt))


def _validate(run: Run) -> str | None:
    """Validate the current step. Return why all ranks stop now, if a stop interrupted the validation.

    A save that is due has begun before the validation. The last step is committed before it,
    because no later save would contain it. Collective: all ranks.
    """
    if run.state.step == run.job.train.max_steps and run.job.checkpoint.save_last:
        run.progress.begin("save", run.state.step)
        run.ckpt.save(run.state, wait=True, reason="last")
        _report_saves(run)
    if evaluate(run):
        return None
    log.info(f"the validation of step {run.state.step} was interrupted, because the run is stopping")
    return _stop_if_agreed(run)


def _save_if_agreed(run: Run) -> StepDecision:
    stopping = run.control.stopping
    run.progress.begin("agree", run.state.step)
    stopping.step_ends()
    agreed = run.control.agree(run.state.step)
    if agreed.save:
        run.progress.begin("save", run.state.step)
        wait = agreed.stop is not None or agreed.hook_failed
        run.ckpt.save(run.state, wait=wait, reason=agreed.save)
    _report_saves(run)
    if agreed.hook_failed:
        run.control.hooks.raise_failure()
    # Without a step to record, the request waits for the next attempt.
    goes_on = agreed.stop is None and run.state.step < run.job.train.max_steps
    requested = agreed.profile and goes_on
    run.control.profiler.step_ended(run.state.step, requested=requested)
    if message := run.ckpt.status_message():
        log.info(message)
    if news := stopping.step_begins():
        log.info(news)
    return agreed


def _stop_if_agreed(run: Run) -> str | None:
    """Commit the current step and stop, if all ranks agree. A committed step is not written again."""
    agreed = run.control.agree_to_stop()
    if agreed.save:
        run.ckpt.save(run.state, wait=True, reason=agreed.save)
        _report_saves(run)
    if agreed.hook_failed:
        run.control.hooks.raise_failure()
    return agreed.stop


def _log_margin(run: Run) -> None:
    """Log how much time was left when the run stopped with its last step committed."""
    if (left_s := run.control.stopping.left_s) is not None:
        run.reports.write({"step": run.state.step, "deadline/margin_s": left_s})
        log.info(f"deadline: {left_s:.1f} s were left")


def _report_saves(run: Run) -> None:
    run.recorder.record(run.ckpt.events())
    for report in run.ckpt.poll():
        if report.error:
            log.warning(f"{report.error}; training continues")
        if report.skipped:
            log.warning(report.skipped)
        run.reports.write({"step": run.state.step, **report.row()})
        run.recorder.saved(report)
        if report.total_s:
            run.progress.saved(report.total_s)
            run.control.stopping.saved(report.total_s)
        if not (report.error or report.skipped):
            run.control.hooks.checkpoint_committed(run.ckpt.folder / paths.step_name(report.step), report)
        for warning in report.warnings:
            log.warning(warning)
        if warning := run.ckpt.lease_warning():
            log.warning(f"the lease of this run cannot be renewed: {warning}")
    for warning in run.ckpt.warnings():
        log.warning(warning)


def evaluate(run: Run) -> bool:
    """Log the mean loss of the first ``eval.num_batches`` global batches of the validation split.

    With a mixture, do so for each source, and weight the losses as the next batch is. The sequences
    are the same in every layout. No random numbers are used. Returns False, without
    logging, if it was interrupted because the run is stopping. Collective: all ranks.
    """
    if not run.val_samples:
        return True
    run.progress.begin("eval", run.state.step)
    if run.step.evaluates_other_weights:
        run.ckpt.wait_for_staging()  # the weights are about to change
    started = time.perf_counter()
    losses = validation_losses(
        run.step,
        run.val_samples,
        run.job,
        run.geometry,
        rank=run.world.rank,
        query_stop=run.control.query_stop,
    )
    taken_s = time.perf_counter() - started
    run.recorder.spent("eval", taken_s)
    run.ckpt.exclude_time(taken_s)
    run.control.stopping.slice_ends()
    if losses is None:
        return False
    loss = weighted_loss(losses, run.train_samples, Cursor(**run.state.cursor).samples)
    run.ckpt.record_metrics(run.state.step, {"eval/loss": loss})
    run.eval_losses.append((run.state.step, loss))
    row = {"step": run.state.step, "eval/loss": loss, **source_rows("eval/loss", losses)}
    run.reports.write(row)
    run.control.hooks.eval_end(run.state.step, row)
    return True


def _row(
    run: Run, update: UpdateResult, lr: float, num_tokens: int, digest: str, timings: Mapping[str, float]
) -> dict[str, Any]:
    tokens_per_s = num_tokens / timings["time/step_s"]
    row: dict[str, Any] = {
        "step": run.state.step,
        "train/loss": update.loss,
        "train/grad_norm": update.grad_norm,
        "train/lr": lr,
        "train/tokens": run.state.tokens,
        "train/tokens_per_s": tokens_per_s,
        "train/skipped_steps": run.state.skipped_steps,
        "data/digest": digest,
        **timings,
        **run.peak_memory.collect(),
    }
    row |= step_rows(run.train_samples, Cursor(**run.state.cursor).samples, update.source_losses)
    if run.job.train.z_loss:
        row["train/z_loss"] = update.z_loss
    if (hooks_s := run.control.hooks.take_seconds()) is not None:
        row["time/hooks_s"] = hooks_s
    if run.peak_flops is not None and run.flops_per_token is not None:
        row["train/mfu"] = mfu(tokens_per_s, run.flops_per_token, run.world.num_ranks, run.peak_flops)
    return row


def _check_skipped_steps(run: Run, num_tokens: int) -> None:
    """Raise NonFiniteError after too many skipped steps, and DataError if the last had no targets that count.

    All ranks count alike, so all raise together.
    """
    limit = run.job.train.max_skipped_steps
    if run.state.skipped_in_a_row < limit:
        return
    if num_tokens == 0:
        raise mark_collective(
            DataError(
                f"{limit} steps in a row were skipped, up to step {run.state.step}, the last because "
                "nothing in its batch counts: all targets are left out of the loss. Raise "
                "train.global_batch_size or train.seq_len, or check the data"
            )
        )
    raise NonFiniteError(
        f"loss or gradients were not finite in {limit} steps in a row, up to step {run.state.step}. "
        "The last committed checkpoint is untouched. Check train/loss and train/grad_norm in "
        f"{run.folder / 'metrics.jsonl'}; a lower optimizer.lr or a longer warmup may help"
    )
