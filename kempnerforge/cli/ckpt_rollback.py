"""``kempnerforge ckpt rollback`` and ``fork``: continue from an older step, in the same run or a new one."""

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
    step: Annotated[str | None, typer.Argument(metavar="STEP", help="The step to roll back to.")] = None,
    undo: Annotated[
        bool, typer.Option("--undo", help="Undo the last rollback, if no attempt has resumed since.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Roll RUN back to STEP: move later steps aside, so that the same command resumes from it.

    With STEP 0 the next start is a fresh start.
    """
    if (step is None) is not undo:
        raise typer.BadParameter("give either STEP or --undo")
    run_dir = find_run(run).run_dir
    if run_dir is None:
        raise RunFolderError(f"{run} has steps of an unknown run; give the run's folder")
    if step is None:
        done = rolling_back.undo(run_dir)
    else:
        with text.progress("verifying") as progress:
            done = rolling_back.roll_back(run_dir, parse_step(step), progress=progress)
    if as_json:
        text.print_json({"run": str(run_dir), **vars(done)})
        return
    for old, new in done.renamed.items():
        typer.echo(f"{old} -> {new}")
    if undo:
        typer.echo(f"undone: {run_dir} will resume from step {done.newest_step}")
    elif not done.changed:
        what = (
            f"step {done.newest_step} is already the newest step of {run_dir}"
            if done.newest_step
            else f"{run_dir} has no committed step"
        )
        typer.echo(f"{what}; nothing was changed")
    else:
        how = f"resume from step {done.newest_step}" if done.newest_step else "start again at step 0"
        kept = f"The later steps are kept in {done.folder} until you delete them.\n" if done.renamed else ""
        typer.echo(
            f"{run_dir} will {how}, with the wandb id {done.timeline_id}.\n"
            f"{kept}To undo this before the next start: kempnerforge ckpt rollback {run_dir} --undo"
        )


def fork(
    step_dir: StepPath,
    new_run: Annotated[Path, typer.Argument(metavar="NEW_RUN", help="Folder to create for the new run.")],
    link: Annotated[
        bool, typer.Option("--link", help="Hard-link files to the old run instead of copying, if possible.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Create NEW_RUN, a new run that continues from STEP_DIR. STEP_DIR is not changed."""
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
        f"{new_run} is a new run that starts at step {done.step} ({text.size(done.size_bytes)}, {how}).\n"
        f"To continue it: run the command of the old run with --run.dir={new_run}"
    )
