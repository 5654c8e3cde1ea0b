"""``kempnerforge wandb``: upload a run that was trained without a network to Weights & Biases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.format.step_info import StepView
from kempnerforge.checkpoint.run import lease, lineage, metadata
from kempnerforge.checkpoint.run.metadata import RunRecord
from kempnerforge.checkpoint.run.resume_report import read_receipts
from kempnerforge.cli import formatting as text
from kempnerforge.cli.ckpt_paths import AsJson, RunPath, find_run
from kempnerforge.errors import EXIT_FINISHED, EXIT_STOPPED, CheckpointError, RunFolderError
from kempnerforge.goodput.event_log import places, read_events
from kempnerforge.goodput.run_history import METRICS
from kempnerforge.telemetry.jsonl import by_step, effective_rows, read_rows
from kempnerforge.telemetry.wandb_upload import Content, Uploaded, upload

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Upload runs that were trained offline to Weights & Biases."""


@app.command()
def sync(
    run: RunPath,
    project: Annotated[str | None, typer.Option(help="Default: the run's metrics.wandb_project.")] = None,
    entity: Annotated[str | None, typer.Option(help="User or team; default: the account's own.")] = None,
    uncommitted: Annotated[
        bool,
        typer.Option("--uncommitted", help="Also upload steps that will be repeated if the run continues."),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Upload even if an attempt may still be logging to wandb online.")
    ] = False,
    timeout_s: Annotated[float, typer.Option(min=1, help="Timeout of the upload in seconds.")] = 600,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be uploaded, without using the network.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Upload the metrics of RUN to one wandb run, each step once. Run it again to upload new steps.

    If several attempts trained a step, upload the values that led to the current state of the run.
    A run that is not finished is uploaded up to its newest committed step.
    """
    run_dir = find_run(run).run_dir
    record = metadata.read(run_dir) if run_dir is not None else None
    if run_dir is None or record is None:
        raise RunFolderError(f"{run} has no {metadata.RUN_FILE}, so its run is unknown")
    read = _read(run_dir, record, project=project, entity=entity, uncommitted=uncommitted)
    if not as_json:
        for line in read.lines(run_dir):
            typer.echo(line)
    done: Uploaded | None = None
    if not dry_run and read.content.steps:
        if not force:
            _refuse_beside_an_online_attempt(run_dir)
        done = upload(read.content, timeout_s=timeout_s)
    if as_json:
        text.print_json(read.as_json(run_dir, done))
    elif done is None:
        typer.echo("nothing was uploaded" + (" (--dry-run)" if dry_run else ""))
    else:
        already = len(read.content.steps) - done.num_steps
        typer.echo(
            f"uploaded {text.count(done.num_steps, 'step')} to {done.url}; {already} were already there"
        )


@dataclass(frozen=True)
class _Read:
    """The data of a run for wandb."""

    content: Content
    num_rows: int
    num_repeated: int
    """Number of rows that are not used: their steps were repeated or rolled back."""
    held_back: Sequence[int]
    """Steps that are not uploaded because they will be repeated if the run continues."""
    has_config: bool

    def lines(self, run_dir: Path) -> list[str]:
        content, steps = self.content, list(self.content.steps)
        first = (
            f"{run_dir}: {text.count(len(steps), 'step')} of {text.count(len(content.receipts), 'attempt')}"
        )
        if steps:
            first += f", {steps[0]} to {steps[-1]}"
        if self.num_repeated:
            repeated = "their steps were repeated or rolled back"
            first += f"; {self.num_repeated} of {self.num_rows} rows are not used: {repeated}"
        result = [first]
        if self.held_back:
            result.append(
                f"held back: {text.count(len(self.held_back), 'step')} up to {self.held_back[-1]}, after the "
                "newest committed step: repeated if the run continues (--uncommitted uploads them)"
            )
        if not self.has_config:
            result.append("no committed step is intact, so the run's config is unknown")
        whose = f"{content.entity}/" if content.entity else ""
        return [*result, f'wandb: run {content.run_id} "{content.name}" of {whose}{content.project}']

    def as_json(self, run_dir: Path, done: Uploaded | None) -> dict[str, Any]:
        return {
            "run": str(run_dir),
            "wandb_id": self.content.run_id,
            "project": self.content.project,
            "entity": self.content.entity,
            "name": self.content.name,
            "attempts": len(self.content.receipts),
            "steps": len(self.content.steps),
            "rows": self.num_rows,
            "rows_that_do_not_count": self.num_repeated,
            "steps_held_back": len(self.held_back),
            "uploaded": None if done is None else vars(done),
        }


def _read(
    run_dir: Path, record: RunRecord, *, project: str | None, entity: str | None, uncommitted: bool
) -> _Read:
    # Read before the rows, so that a commit in the meantime can only make the limit too low.
    folder = record.checkpoint_folder(run_dir)
    committed = paths.committed_steps(folder) if folder.is_dir() else []
    limit = math.inf if uncommitted else last_lasting_step(record, committed)
    try:
        rows = read_rows(run_dir / METRICS).rows
    except FileNotFoundError:
        raise RunFolderError(f"{run_dir} has no {METRICS}: nothing has been logged yet") from None
    cuts = lineage.cuts(run_dir)
    counting = effective_rows(rows, {cut.attempt: cut.step for cut in cuts})
    steps = by_step(counting)
    config = _config(folder, committed)
    metrics, names = config.get("metrics", {}), config.get("run", {})
    content = Content(
        run_id=record.timeline_id,
        project=project or metrics.get("wandb_project", "kempnerforge"),
        entity=entity,
        name=metrics.get("wandb_run_name") or names.get("name") or run_dir.resolve().name,
        config=config,
        receipts=read_receipts(run_dir),
        places=places(read_events(run_dir)),
        steps={step: row for step, row in steps.items() if step <= limit},
        failed=bool(record.last_exit) and record.last_exit["status"] not in (EXIT_FINISHED, EXIT_STOPPED),
    )
    held_back = [step for step in steps if step > limit]
    return _Read(content, len(rows), len(rows) - len(counting), held_back, bool(config))


def last_lasting_step(record: RunRecord, committed: Sequence[int]) -> float:
    """Return the newest step that no later attempt will repeat.

    This is the newest committed step, from which the next attempt resumes. A finished run has no
    limit, because its checkpoints may be deleted.
    """
    last = record.last_exit
    if last is not None and last["attempt"] == record.attempt and last["status"] == EXIT_FINISHED:
        return math.inf
    return max(committed, default=0)


def _config(folder: Path, committed: Sequence[int]) -> dict[str, Any]:
    """Return the config of the newest intact step; an empty dict if there is none."""
    for step in committed:
        try:
            return StepView.open(folder / paths.step_name(step), step=step).config()
        except (CheckpointError, OSError):
            continue
    return {}


def _refuse_beside_an_online_attempt(run_dir: Path) -> None:
    """Refuse the upload while an attempt is logging online: two clients would overwrite each other's rows."""
    newest = run_dir / "wandb" / "latest-run"
    holder = lease.live_holder(run_dir)
    if holder and newest.is_symlink() and not newest.readlink().name.startswith("offline-"):
        raise RunFolderError(
            f"{holder} may be logging to wandb online and uploads everything itself. Wait until it has "
            f"ended. If you know that it has ended: kempnerforge wandb sync {run_dir} --force"
        )
