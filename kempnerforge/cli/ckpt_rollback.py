"""``kempnerforge ckpt rollback`` and ``fork``: go on from an older step, in the same run or in a new one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kempnerforge.checkpoint.tools import fork as forking
from kempnerforge.checkpoint.tools import rollback as rolling_back
from kempnerforge.cli import formatting as text
from kempnerforge.cli.ckpt_paths import AsJson, RunPath, StepPath, find_run, find_step, parse_step
from kempnerforge.errors import RunFolderError


def rollback(
    run: RunPath,
    step: Annotated[str | None, typer.Argument(metavar="STEP", help="The step to go back to.")] = None,
    undo: Annotated[
        bool, typer.Option("--undo", help="Take the last rollback back, if no attempt has gone on since.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Go back to STEP of RUN: set later steps aside, so that the same command goes on from it.

    0 is the beginning: the next start is a fresh one.
    """
    if (step is None) is not undo:
        raise typer.BadParameter("give either STEP or --undo")
    run_dir = find_run(run).run_dir
    if run_dir is None:
        raise RunFolderError(f"{run} holds steps, but it is not known of which run; give the run's folder")
    if step is None:
        done = rolling_back.undo(run_dir, note=_note)
    else:
        with text.progress("verifying") as progress:
            done = rolling_back.roll_back(run_dir, parse_step(step), note=_note, progress=progress)
    if as_json:
        text.print_json({"run": str(run_dir), **vars(done)})
        return
    for old, new in done.renamed.items():
        typer.echo(f"{old} -> {new}")
    if undo:
        typer.echo(f"undone: {run_dir} goes on from step {done.newest_step} again")
    elif not done.changed:
        what = f"step {done.newest_step} is the newest of" if done.newest_step else "no step is committed in"
        typer.echo(f"{what} {run_dir} already; nothing was changed")
    else:
        how = f"goes on from step {done.newest_step}" if done.newest_step else "begins again at step 0"
        kept = f"The steps above are kept in {done.folder} until you delete them.\n" if done.renamed else ""
        typer.echo(
            f"{run_dir} {how} when it is started again, in wandb as {done.wandb_id}.\n"
            f"{kept}To undo, before it is started: kempnerforge ckpt rollback {run_dir} --undo"
        )


def fork(
    step_dir: StepPath,
    new_run: Annotated[Path, typer.Argument(metavar="NEW_RUN", help="The folder to make for the new run.")],
    link: Annotated[
        bool, typer.Option("--link", help="Share the files with the old run where that is possible.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make NEW_RUN a new run that goes on from STEP_DIR, which stays as it is."""
    source = find_step(step_dir)
    with text.progress("copying") as progress:
        done = forking.fork(source, new_run, link=link, progress=progress)
    if as_json:
        values = {**vars(done), "run_dir": str(done.run_dir), "parent": vars(done.parent)}
        text.print_json(values)
        return
    how = f"{done.copied_files} files copied"
    if link:
        how += f", {done.linked_files} shared with {source}"
    typer.echo(
        f"{new_run} is a new run that begins at step {done.step} ({text.size(done.size_bytes)}, {how}).\n"
        f"To go on: the command of the old run with --run.dir={new_run}"
    )


def _note(said: str) -> None:
    typer.echo(said, err=True)
