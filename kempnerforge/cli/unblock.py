"""``kempnerforge unblock``: let a run go on that was stopped for lack of progress."""

from __future__ import annotations

import typer

from kempnerforge.checkpoint import lease, timeline
from kempnerforge.cli.ckpt_paths import RunPath, find_run
from kempnerforge.errors import LeaseHeldError, RunFolderError
from kempnerforge.goodput.ledger import Ledger

app = typer.Typer()


@app.command()
def unblock(run: RunPath) -> None:
    """Say that the cause of RUN's faults is seen to: attempts so far no longer count against it."""
    run_dir = find_run(run).run_dir
    if run_dir is None:
        raise RunFolderError(f"{run} holds steps, but it is not known of which run; give the run's folder")
    if writer := lease.live_holder(run_dir):
        raise LeaseHeldError(f"{run_dir} is being written by {writer}; it is not blocked")
    attempt = timeline.last_attempt(run_dir)
    Ledger(run_dir, attempt).write("unblock")
    typer.echo(f"{run_dir}: faults up to attempt {attempt} no longer count; start the same command again")
