"""``kempnerforge report``: how a run spent its time, how its attempts ended, and how often to save."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from kempnerforge import fsio
from kempnerforge.checkpoint.run import lease, lineage
from kempnerforge.checkpoint.run.resume_report import METRICS
from kempnerforge.cli import formatting as text
from kempnerforge.cli.ckpt_paths import AsJson, RunPath, find_run
from kempnerforge.cli.report_page import KEYS, Report, page
from kempnerforge.cli.report_text import print_report
from kempnerforge.cli.report_timeline import Commit
from kempnerforge.errors import RunFolderError
from kempnerforge.goodput.accounting import account, saving
from kempnerforge.goodput.history import AttemptHistory, read_history
from kempnerforge.telemetry.curves import read_curves

app = typer.Typer()


@app.command()
def report(
    run: RunPath,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", dir_okay=False, help="Also write a self-contained HTML page with plots."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Report the effective training time of RUN, lost time, ends of attempts and save intervals."""
    run_dir = find_run(run).run_dir
    if run_dir is None:
        raise RunFolderError(f"{run} has steps of an unknown run; give the run's folder")
    cuts = lineage.cuts(run_dir)
    history = read_history(run_dir, rollbacks=[cut.attempt for cut in cuts if cut.is_rollback])
    if not history:
        raise RunFolderError(f"{run_dir} has no ledger yet: no attempt has recorded an event")
    running = history[-1].end is None and bool(lease.live_holder(run_dir))
    if running:
        history[-1].end = {"kind": "running", "reason": "still running", "step": None}
    now = time.time()
    body = account(history, now=now, running=running)
    rollbacks = [cut.attempt for cut in cuts if cut.is_rollback]
    body["saving"] = saving(history, wall_s=body["wall_s"] - body["parts_s"]["idle"], rollbacks=rollbacks)
    size_bytes = _write_page(html, run_dir, body, history, cuts, now) if html is not None else 0
    if as_json:
        text.print_json(body)
        return
    print_report(str(run_dir), body)
    if html is not None:
        typer.echo(f"wrote {html} ({text.size(size_bytes)}); open it in a browser")


def _write_page(
    file: Path,
    run_dir: Path,
    body: dict[str, Any],
    history: list[AttemptHistory],
    cuts: list[lineage.ResumePoint],
    now: float,
) -> int:
    """Write the page and return its size in bytes. Raises RunFolderError if it cannot be written."""
    curves = read_curves(run_dir / METRICS, KEYS, {cut.attempt: cut.step for cut in cuts})
    commits = [
        Commit(attempt.number, event["time"], event["step"])
        for attempt in history
        for event in attempt.commits
    ]
    content = page(Report(str(run_dir.resolve()), body, curves, commits, now))
    try:
        fsio.atomic_write(file, content)
    except OSError as error:
        raise RunFolderError(
            f"{file} cannot be written: {error.strerror}; "
            "give --html a file in an existing folder that you can write to"
        ) from error
    return len(content)
