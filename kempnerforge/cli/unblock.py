"""``kempnerforge unblock``: allow a run to start again that the crash-loop guard has blocked."""

from __future__ import annotations

import typer

from kempnerforge.checkpoint.tools import unblock as unblocking
from kempnerforge.cli.ckpt_paths import RunPath, find_run
from kempnerforge.errors import RunFolderError

app = typer.Typer()


@app.command()
def unblock(run: RunPath) -> None:
    """Reset the failure counter of RUN and restore its suspect steps, after you fixed the cause."""
    checkpoints = find_run(run)
    if checkpoints.run_dir is None:
        raise RunFolderError(f"{run} has steps of an unknown run; give the run's folder")
    done = unblocking.unblock(checkpoints.run_dir)
    for old, new in done.renamed.items():
        typer.echo(f"{old} -> {new}")
    for name, why in done.left.items():
        typer.echo(
            f"{name} is not restored: {why}. "
            f"To continue from it in a new run: kempnerforge ckpt fork {checkpoints.folder / name} NEW_RUN"
        )
    typer.echo(
        f"{checkpoints.run_dir}: reset the failure counter, up to attempt {done.attempt}; run the same "
        "command to resume"
    )
