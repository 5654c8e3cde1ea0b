"""``kempnerforge unblock``: let a run go on that was stopped for lack of progress."""

from __future__ import annotations

import typer

from kempnerforge.checkpoint.tools import unblock as unblocking
from kempnerforge.cli.ckpt_paths import RunPath, find_run
from kempnerforge.errors import RunFolderError

app = typer.Typer()


@app.command()
def unblock(run: RunPath) -> None:
    """Declare the cause of RUN's faults fixed: reset the count, name suspect steps back."""
    found = find_run(run)
    if found.run_dir is None:
        raise RunFolderError(f"{run} holds steps, but it is not known of which run; give the run's folder")
    done = unblocking.unblock(found.run_dir, note=lambda said: typer.echo(said, err=True))
    for old, new in done.renamed.items():
        typer.echo(f"{old} -> {new}")
    for name, why in done.left.items():
        typer.echo(
            f"{name} stays set aside: {why}. "
            f"To go on from it in a run of its own: kempnerforge ckpt fork {found.folder / name} NEW_RUN"
        )
    typer.echo(
        f"{found.run_dir}: faults up to attempt {done.attempt} no longer count; start the same command again"
    )
