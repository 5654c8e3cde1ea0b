"""``kempnerforge ckpt pin``, ``unpin`` and ``prune``: keep and delete steps."""

from __future__ import annotations

from typing import Annotated

import typer

from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.retention import pins
from kempnerforge.checkpoint.retention.pruner import Retention
from kempnerforge.cli import formatting as text
from kempnerforge.cli.ckpt_list import bytes_on_disk, files_of
from kempnerforge.cli.ckpt_paths import AsJson, RunPath, find_policy, find_run, parse_step
from kempnerforge.errors import EXIT_FAULT, RunFolderError

Step = Annotated[str, typer.Argument(metavar="STEP", help="The step's number.")]


def pin(
    run: RunPath,
    step: Step,
    note: Annotated[str, typer.Option(metavar="TEXT", help="Reason, shown by ckpt explain.")] = "",
    as_json: AsJson = False,
) -> None:
    """Keep a step of RUN until it is unpinned. Works while the run is writing."""
    folder, number = find_run(run).folder, parse_step(step)
    changed = pins.pin(folder, number, note=note)
    if as_json:
        text.print_json({"step": number, "pinned": True, "changed": changed})
    else:
        typer.echo(f"step {number} {'is pinned' if changed else 'was already pinned'}")


def unpin(run: RunPath, step: Step, as_json: AsJson = False) -> None:
    """Apply the run's retention rules to a pinned step again."""
    folder, number = find_run(run).folder, parse_step(step)
    changed = pins.unpin(folder, number)
    if as_json:
        text.print_json({"step": number, "pinned": False, "changed": changed})
    else:
        typer.echo(f"step {number} {'is no longer pinned' if changed else 'was not pinned'}")


def prune(
    run: RunPath,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the steps, delete nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete the steps of RUN that its config does not keep, as a run does after each save."""
    checkpoints = find_run(run)
    policy = find_policy(checkpoints, paths.list_folder(checkpoints.folder).steps)
    if not policy.source:
        raise RunFolderError(f"{checkpoints.folder}: the retention rules are unknown: {policy.problem}")
    retention = Retention(checkpoints.folder, policy.policy, checkpoints.owner)
    doomed = [verdict.step for verdict in reversed(retention.verdicts()) if not verdict.keep]
    files = {step: files_of(checkpoints.step(step)) for step in doomed}
    warnings: tuple[str, ...] = ()
    if not dry_run:
        done = retention.apply()
        doomed, warnings = list(done.deleted), done.warnings
    freed = bytes_on_disk((found for step in doomed for found in files.get(step, ())), if_deleted=True)
    if as_json:
        body = {"dry_run": dry_run, "policy_from": policy.source, "steps": doomed, "freed_bytes": freed}
        text.print_json({**body, "warnings": list(warnings)})
    else:
        steps = f"{len(doomed)} {'step' if len(doomed) == 1 else 'steps'}"
        listed = f": {', '.join(map(str, doomed))}" if doomed else ""
        typer.echo(f"{'would delete' if dry_run else 'deleted'} {steps} ({text.size(freed)}){listed}")
        for warning in warnings:
            typer.echo(warning, err=True)
    if warnings:
        raise typer.Exit(EXIT_FAULT)
