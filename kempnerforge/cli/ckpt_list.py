"""``kempnerforge ckpt ls``: which steps there are, and what is known of each."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from kempnerforge.checkpoint.format import manifest, paths
from kempnerforge.checkpoint.format.manifest import Manifest
from kempnerforge.checkpoint.retention.policy import Verdict, decide
from kempnerforge.checkpoint.retention.pruner import Retention
from kempnerforge.checkpoint.run import lease
from kempnerforge.cli import formatting as text
from kempnerforge.cli.ckpt_paths import AsJson, CheckpointFolder, FoundPolicy, RunPath, find_policy, find_run
from kempnerforge.errors import EXIT_FAULT, CheckpointError, StepNotFoundError

OTHERS = ("in flight", "being deleted", "quarantined", "rolled back", "late", "suspect")
"""Folders that are no committed steps, in the order in which they are shown."""


@dataclass(frozen=True)
class Listed:
    """One committed step."""

    step: int
    found: CheckpointFolder
    verdict: Verdict
    problem: str
    """Why it is not sound; empty when it is, or looks so."""
    manifest: Manifest | None
    """None when it cannot be parsed."""
    foreign: str = ""
    """The id of the other run that it is of; empty for a step of this one."""

    @property
    def path(self) -> Path:
        """Its folder."""
        return self.found.step(self.step)


def ls(
    run: RunPath,
    digests: Annotated[
        bool, typer.Option("--verify", help="Check every byte, not only manifests, names and sizes.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List the steps of RUN: age, size, what each was saved for, why it is kept, whether it is sound.

    With --verify the exit status is 1 when a step is damaged.
    """
    found = find_run(run)
    listing = paths.list_folder(found.folder)
    policy = find_policy(found, listing.steps)
    steps = list(list_steps(found, listing.steps, policy, digests=digests))
    others = list_others(listing)
    writer = "" if found.run_dir is None else lease.live_holder(found.run_dir)
    if as_json:
        body = {
            "folder": str(found.folder),
            "writer": writer or None,
            "digests_checked": digests,
            "steps": [_as_json(one, digests=digests) for one in steps],
            "others": others,
        }
        text.print_json(body)
    else:
        _print_steps(found, steps, digests=digests, known_policy=bool(policy.source))
        for other in others:
            name = Path(other["path"]).name
            typer.echo(f"{other['what']}: {name}, {text.size(other['size_bytes'])}")
        if writer:
            typer.echo(f"a run is writing here: {writer}")
    if digests and any(one.problem for one in steps):
        raise typer.Exit(EXIT_FAULT)


def list_steps(
    found: CheckpointFolder, steps: Sequence[int], policy: FoundPolicy, *, digests: bool
) -> Iterator[Listed]:
    """The committed ``steps``, newest first; those that vanish meanwhile are left out."""
    manifests: dict[int, Manifest] = {}
    retention = Retention(found.folder, policy.policy, found.owner)
    facts = retention.survey(steps, seen=manifests.__setitem__)
    verdicts = {verdict.step: verdict for verdict in decide(facts, policy.policy)}
    for one in facts:
        problem = one.problem
        if digests and not problem:
            try:
                problem = "; ".join(_digest_problems(found.step(one.step)))
            except StepNotFoundError:
                continue
        known = manifests.get(one.step) or manifest_of(found.step(one.step))
        yield Listed(one.step, found, verdicts[one.step], problem, known, one.foreign)


def list_others(listing: paths.FolderListing) -> list[dict[str, Any]]:
    """Folders in flight, being deleted and set aside, with their bytes so far."""
    groups = [
        [path for path, _ in listing.temporary],
        listing.deleting,
        listing.quarantined,
        listing.rolled_back,
        listing.late,
        listing.suspect,
    ]
    return [
        {"what": what, "path": str(path), "size_bytes": folder_bytes(path)}
        for what, members in zip(OTHERS, groups, strict=True)
        for path in sorted(members)
        if path.exists()
    ]


def folder_bytes(folder: Path) -> int:
    """Bytes of the files in ``folder``, leaving out what vanishes meanwhile."""
    total = 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    total += entry.stat(follow_symlinks=False).st_size
                except FileNotFoundError:
                    continue
    except FileNotFoundError:
        return 0
    return total


def _digest_problems(path: Path) -> tuple[str, ...]:
    from kempnerforge.checkpoint.tools.verify import verify

    try:
        with text.progress(path.name) as progress:
            return verify(path, progress=progress).problems
    except StepNotFoundError:
        raise
    except CheckpointError as error:
        return (str(error),)


def manifest_of(path: Path) -> Manifest | None:
    """Return the manifest of a step; None when it cannot be read."""
    try:
        return manifest.read(path)
    except (CheckpointError, OSError):
        return None


def _print_steps(found: CheckpointFolder, steps: list[Listed], *, digests: bool, known_policy: bool) -> None:
    if not steps:
        typer.echo(f"{found.folder}: no committed step")
        return
    rows = [("step", "age", "size", "saved for", "kept as", "state")]
    for one in steps:
        known = one.manifest
        kept = ", ".join(dict.fromkeys(reason.rule for reason in one.verdict.reasons))
        unkept = "nothing: goes after the next save" if known_policy else "?"
        state = f"NOT SOUND: {one.problem}" if one.problem else "sound" if digests else "looks sound"
        if one.foreign:
            state += f", of another run: {one.foreign}"
        rows.append(
            (
                str(one.step),
                text.age(known.time) if known else "?",
                text.size(known.size_bytes) if known else "?",
                known.provenance.reason if known else "?",
                kept or unkept,
                state,
            )
        )
    text.print_columns(rows, right=(0, 2))


def _as_json(one: Listed, *, digests: bool) -> dict[str, Any]:
    known = one.manifest
    provenance = asdict(known.provenance) if known else {}
    state = "not sound" if one.problem else "sound" if digests else "looks sound"
    return {
        **verdict_json(one.verdict),
        "path": str(one.path),
        "state": state,
        "problem": one.problem or None,
        "time": known.time if known else None,
        "size_bytes": known.size_bytes if known else None,
        "saved_for": provenance.get("reason"),
        "run_id": provenance.get("run_id"),
        "another_runs": bool(one.foreign),
        "attempt": provenance.get("attempt"),
        "parent_step": provenance.get("parent_step"),
        "metrics": provenance.get("metrics"),
    }


def verdict_json(verdict: Verdict) -> dict[str, Any]:
    """Return what becomes of a step, as ``--json`` tells it."""
    return {
        "step": verdict.step,
        "keep": verdict.keep,
        "reasons": [asdict(reason) for reason in verdict.reasons],
    }
