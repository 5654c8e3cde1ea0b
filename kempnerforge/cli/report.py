"""``kempnerforge report``: how a run spent its time, how its attempts ended, and how often to save."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from kempnerforge import fsio
from kempnerforge.checkpoint.run import lease, lineage
from kempnerforge.checkpoint.run.resume_report import read_receipts
from kempnerforge.cli import formatting as text
from kempnerforge.cli.ckpt_paths import AsJson, find_run
from kempnerforge.cli.log_end import last_rows
from kempnerforge.cli.report_compare import RunRead, compare_runs
from kempnerforge.cli.report_page import KEYS, Report, page
from kempnerforge.cli.report_sweep import print_sweep
from kempnerforge.cli.report_text import print_report
from kempnerforge.cli.report_timeline import Commit
from kempnerforge.cli.run_facts import LAST, attempt_changes, run_facts
from kempnerforge.errors import RunFolderError
from kempnerforge.goodput.accounting import account, saving
from kempnerforge.goodput.history import read_history
from kempnerforge.goodput.run_history import METRICS
from kempnerforge.slurm.sweep import SWEEP_FILE
from kempnerforge.telemetry.curves import read_curves

app = typer.Typer()


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN [OTHER]",
            help="A run's folder, or the folder of its checkpoints; two to compare them.",
        ),
    ],
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            dir_okay=False,
            help="Also write a self-contained HTML page with plots. For one run only.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Report what RUN is and how it spent its time, or how OTHER differs: config, losses, goodput.

    If RUN is the folder of a sweep, print the progress and the losses of its runs instead.
    """
    if len(runs) > 2:
        raise typer.BadParameter("give one run, or two to compare them")
    if len(runs) == 2:
        if html is not None:
            raise typer.BadParameter("--html FILE shows one run; give one run, or leave --html out")
        compare_runs([_read(run) for run in runs], as_json=as_json)
        return
    if (runs[0] / SWEEP_FILE).is_file():
        if html is not None:
            raise typer.BadParameter("--html FILE shows one run; give one run of the sweep")
        print_sweep(runs[0], as_json=as_json)
        return
    found = _read(runs[0])
    size_bytes = _write_page(html, found) if html is not None else 0
    if as_json:
        text.print_json(found.body)
        return
    print_report(str(found.run_dir), found.body)
    if html is not None:
        typer.echo(f"wrote {html} ({text.size(size_bytes)}); open it in a browser")


def _read(run: Path) -> RunRead:
    """Read the records of a run. Raises RunFolderError."""
    run_dir = find_run(run).run_dir
    if run_dir is None:
        raise RunFolderError(f"{run} has steps of an unknown run; give the run's folder")
    cuts = lineage.cuts(run_dir)
    rollbacks = [cut.attempt for cut in cuts if cut.is_rollback]
    history = read_history(run_dir, rollbacks=rollbacks)
    if not history:
        raise RunFolderError(f"{run_dir} has no ledger yet: no attempt has recorded an event")
    running = history[-1].end is None and bool(lease.live_holder(run_dir))
    if running:
        history[-1].end = {"kind": "running", "reason": "still running", "step": None}
    now = time.time()
    body = account(history, now=now, running=running)
    body["saving"] = saving(history, wall_s=body["wall_s"] - body["parts_s"]["idle"], rollbacks=rollbacks)
    body["run"] = run_facts(history, last_rows(run_dir / METRICS, list(LAST), cuts))
    changes = attempt_changes(history, read_receipts(run_dir))
    for attempt in body["attempts"]:
        attempt["changes"] = changes[attempt["attempt"]]
    return RunRead(run_dir, body, history, cuts, now)


def _write_page(file: Path, run: RunRead) -> int:
    """Write the page and return its size in bytes. Raises RunFolderError if it cannot be written."""
    curves = read_curves(run.run_dir / METRICS, KEYS, {cut.attempt: cut.step for cut in run.cuts})
    commits = [
        Commit(attempt.number, event["time"], event["step"])
        for attempt in run.history
        for event in attempt.commits
    ]
    content = page(Report(str(run.run_dir.resolve()), run.body, curves, commits, run.now))
    try:
        fsio.atomic_write(file, content)
    except OSError as error:
        raise RunFolderError(
            f"{file} cannot be written: {error.strerror}; "
            "give --html a file in an existing folder that you can write to"
        ) from error
    return len(content)
