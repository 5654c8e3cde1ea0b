"""The metric sinks of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kempnerforge.checkpoint.run.lineage import cuts
from kempnerforge.checkpoint.run.metadata import RunRecord
from kempnerforge.checkpoint.run.resume_report import Receipt, read_receipts
from kempnerforge.config.schema import JobConfig
from kempnerforge.goodput.event_log import places
from kempnerforge.goodput.run_history import RunHistory
from kempnerforge.telemetry.console import ConsoleSink
from kempnerforge.telemetry.jsonl import JsonlSink, by_step, effective_rows, read_rows
from kempnerforge.telemetry.sinks import RowWriter, RunInfo, SinkSet
from kempnerforge.telemetry.wandb_sink import Earlier, WandbSink, attempt_config
from kempnerforge.train.guarded_sink import GuardedSink, plugin_sinks
from kempnerforge.train.replay_check import ReplayCheck

log = logging.getLogger(__name__)


class Reports:
    """The metric sinks of a run. Ranks other than 0 have none, so that the loop needs no rank test."""

    def __init__(
        self,
        sinks: SinkSet,
        *,
        wandb: WandbSink | None = None,
        plugins: Sequence[GuardedSink] = (),
        metrics: Path | None = None,
        earlier: Callable[[], Earlier] = lambda: Earlier({}, {}, {}),
    ) -> None:
        self._sinks = sinks
        self._wandb = wandb
        self._plugins = plugins
        self._metrics = metrics
        self._earlier = earlier

    def start(self, info: RunInfo) -> None:
        """Tell the sinks of the config which attempt begins. Rows follow."""
        for sink in self._plugins:
            sink.start(info)

    def write(self, row: Mapping[str, Any]) -> None:
        """Write a row of metrics to all sinks."""
        self._sinks.write(row)

    def receipt(self, receipt: Mapping[str, Any]) -> None:
        """Upload a resume receipt to wandb, and the metrics of earlier attempts that wandb lacks."""
        if self._wandb is not None:
            self._wandb.receipt(receipt)
            self._wandb.catch_up(self._earlier)

    def replay_check(self, receipt: Receipt) -> ReplayCheck:
        """Return the check of this attempt's first losses against rows of an earlier attempt."""
        try:
            return ReplayCheck.of(self._metrics, receipt) if self._metrics is not None else ReplayCheck()
        except OSError as error:
            log.warning(f"losses are not compared with those before the resume: {error}")
            return ReplayCheck()

    def lacks_validation(self, receipt: Receipt) -> bool:
        """Return whether no attempt has logged, or tried to log, ``eval/loss`` of the step of ``receipt``.

        The first attempt that resumes from a step tries to log it. Rank 0 only.
        """
        assert self._metrics is not None
        try:
            attempts = {row["attempt"]: row["step"] for row in read_receipts(self._metrics.parent)}
            rows = effective_rows(read_rows(self._metrics, having="eval/loss").rows, attempts)
        except OSError as error:
            log.warning(f"whether step {receipt.step} has been validated is not known: {error}")
            return False
        tried = any(step == receipt.step for attempt, step in attempts.items() if attempt < receipt.attempt)
        return not tried and all(row["step"] != receipt.step for row in rows)

    def close(self) -> None:
        """Flush and close all sinks."""
        self._sinks.close()


def build_reports(
    job: JobConfig,
    console: ConsoleSink | None,
    *,
    device: torch.device,
    folder: Path,
    record: RunRecord,
    history: RunHistory,
) -> Reports:
    """Return the configured sinks, the first of which is ``console``; none on ranks without a console.

    ``history`` has the start of this attempt.
    """
    if console is None:
        return Reports(SinkSet())
    metrics = folder / "metrics.jsonl"
    sinks: list[RowWriter] = [console]
    try:
        sinks.append(JsonlSink(metrics, record.attempt))
    except OSError as error:  # rows are lost, as with a full disk later, but the run continues
        log.warning(f"{metrics}: cannot write metrics ({error}); the rows of this attempt are lost")
    wandb = None
    if job.metrics.enable_wandb:
        wandb = WandbSink(
            folder,
            job.metrics.wandb_project,
            job.metrics.wandb_run_name or job.run.name,
            record.timeline_id,  # wandb accepts no step below its newest one, so no rolled back ones
            job.model_dump(mode="json"),
            record.attempt,
            **_known_to_wandb(history, record, metrics),
        )
        sinks.append(wandb)
    plugins = plugin_sinks(job, device)
    return Reports(
        SinkSet([*sinks, *plugins]),
        wandb=wandb,
        plugins=plugins,
        metrics=metrics,
        earlier=partial(_earlier, folder, record, metrics, history),
    )


def _known_to_wandb(history: RunHistory, record: RunRecord, metrics: Path) -> dict[str, Any]:
    """Return where the attempt runs, and the first step that no earlier attempt has logged.

    Unreadable records give a warning and defaults.
    """
    try:
        place = places(history.events()).get(record.attempt, {})
        step = read_rows(metrics).next_step(record.timeline_first_attempt)
    except OSError as error:
        log.warning(f"what earlier attempts logged to wandb is not known: {error}")
        return {"place": {}, "first_new_step": 0}
    return {"place": place, "first_new_step": step}


def _earlier(folder: Path, record: RunRecord, metrics: Path, history: RunHistory) -> Earlier:
    """Return what earlier attempts logged to the same wandb run."""
    where, config = places(history.events()), {}
    for receipt in read_receipts(folder):
        attempt = receipt["attempt"]
        if record.timeline_first_attempt <= attempt < record.attempt:
            entries = attempt_config(attempt, receipt, where.get(attempt, {}))
            config |= {key: value for key, value in entries.items() if f"/attempt_{attempt:04d}" in key}
    rows = [row for row in read_rows(metrics).rows if row["attempt"] >= record.timeline_first_attempt]
    newest_steps: dict[int, int] = {}
    for row in rows:
        newest_steps[row["attempt"]] = max(row["step"], newest_steps.get(row["attempt"], 0))
    counting = effective_rows(rows, {cut.attempt: cut.step for cut in cuts(folder)})
    return Earlier(config, by_step(counting), newest_steps)
