"""``kempnerforge ckpt ls``: list the steps of a run."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
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
"""Kinds of folders that are not committed steps, in the order in which they are shown."""


@dataclass(frozen=True)
class Listed:
    """One committed step."""

    step: int
    checkpoints: CheckpointFolder
    verdict: Verdict
    problem: str
    """Why the step is corrupt; empty if no problem was found."""
    manifest: Manifest | None
    """None if it cannot be parsed."""
    foreign: str = ""
    """Id of the other run that owns the step; empty if this run owns it."""

    @property
    def path(self) -> Path:
        """Folder of the step."""
        return self.checkpoints.step(self.step)


def ls(
    run: RunPath,
    digests: Annotated[
        bool, typer.Option("--verify", help="Verify every byte, not only manifests, names and sizes.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List the steps of RUN: age, size, why each was saved, why it is kept, whether it is ok.

    With --verify the exit status is 1 if a step is corrupt.
    """
    checkpoints = find_run(run)
    listing = paths.list_folder(checkpoints.folder)
    policy = find_policy(checkpoints, listing.steps)
    steps = list(list_steps(checkpoints, listing.steps, policy, digests=digests))
    others = list_others(listing)
    writer = "" if checkpoints.run_dir is None else lease.live_holder(checkpoints.run_dir)
    if as_json:
        body = {
            "folder": str(checkpoints.folder),
            "writer": writer or None,
            "digests_checked": digests,
            "steps": [_as_json(step, digests=digests) for step in steps],
            "others": others,
        }
        text.print_json(body)
    else:
        _print_steps(checkpoints, steps, digests=digests, known_policy=bool(policy.source))
        for other in others:
            name = Path(other["path"]).name
            typer.echo(f"{other['what']}: {name}, {text.size(other['size_bytes'])}")
        if writer:
            typer.echo(f"a run is writing here: {writer}")
    if digests and any(step.problem for step in steps):
        raise typer.Exit(EXIT_FAULT)


def list_steps(
    checkpoints: CheckpointFolder, steps: Sequence[int], policy: FoundPolicy, *, digests: bool
) -> Iterator[Listed]:
    """Yield the committed ``steps``, newest first, without those that disappear in the meantime."""
    manifests: dict[int, Manifest] = {}
    retention = Retention(checkpoints.folder, policy.policy, checkpoints.owner)
    facts = retention.survey(steps, seen=manifests.__setitem__)
    verdicts = {verdict.step: verdict for verdict in decide(facts, policy.policy)}
    for step in facts:
        problem = step.problem
        if digests and not problem:
            try:
                problem = "; ".join(_digest_problems(checkpoints.step(step.step)))
            except StepNotFoundError:
                continue
        stored = manifests.get(step.step) or manifest_of(checkpoints.step(step.step))
        yield Listed(step.step, checkpoints, verdicts[step.step], problem, stored, step.foreign)


def list_others(listing: paths.FolderListing) -> list[dict[str, Any]]:
    """Return the folders that are in flight, being deleted or moved aside, with their current sizes."""
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


def files_of(folder: Path) -> list[os.stat_result]:
    """Return the status of the files in ``folder``, without files that disappear in the meantime."""
    found: list[os.stat_result] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    found.append(os.lstat(entry.path))
    except FileNotFoundError:
        pass
    return found


def folder_bytes(folder: Path) -> int:
    """Return the bytes of the files in ``folder``."""
    return sum(found.st_size for found in files_of(folder))


def bytes_on_disk(files: Iterable[os.stat_result], *, if_deleted: bool = False) -> int:
    """Return the bytes of ``files`` on the disk. A file that several steps link to counts once.

    ``if_deleted``: only what a deletion of all of them frees, so no file that others link to as well.
    """
    links: Counter[tuple[int, int]] = Counter()
    kept: dict[tuple[int, int], os.stat_result] = {}
    for found in files:
        key = (found.st_dev, found.st_ino)
        links[key] += 1
        kept[key] = found
    return sum(found.st_size for key, found in kept.items() if not if_deleted or links[key] >= found.st_nlink)


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
    """Return the manifest of a step; None if it cannot be read."""
    try:
        return manifest.read(path)
    except (CheckpointError, OSError):
        return None


def _print_steps(
    checkpoints: CheckpointFolder, steps: list[Listed], *, digests: bool, known_policy: bool
) -> None:
    if not steps:
        typer.echo(f"{checkpoints.folder}: no committed step")
        return
    rows = [("step", "age", "size", "saved for", "kept as", "state")]
    for listed in steps:
        stored = listed.manifest
        kept = ", ".join(dict.fromkeys(reason.rule for reason in listed.verdict.reasons))
        unkept = "nothing: deleted after the next save" if known_policy else "?"
        state = "ok" if digests else "ok (unverified)"
        if listed.problem:
            state = f"corrupt: {listed.problem}"
        if listed.foreign:
            state += f", of another run: {listed.foreign}"
        rows.append(
            (
                str(listed.step),
                text.age(stored.time) if stored else "?",
                text.size(stored.size_bytes) if stored else "?",
                stored.provenance.reason if stored else "?",
                kept or unkept,
                state,
            )
        )
    text.print_columns(rows, right=(0, 2))


def _as_json(listed: Listed, *, digests: bool) -> dict[str, Any]:
    stored = listed.manifest
    provenance = asdict(stored.provenance) if stored else {}
    # The values of "state" are older than the words on the terminal. Scripts depend on them.
    state = "not sound" if listed.problem else "sound" if digests else "looks sound"
    return {
        **verdict_json(listed.verdict),
        "path": str(listed.path),
        "state": state,
        "problem": listed.problem or None,
        "time": stored.time if stored else None,
        "size_bytes": stored.size_bytes if stored else None,
        "saved_for": provenance.get("reason"),
        "run_id": provenance.get("run_id"),
        "another_runs": bool(listed.foreign),
        "attempt": provenance.get("attempt"),
        "parent_step": provenance.get("parent_step"),
        "metrics": provenance.get("metrics"),
    }


def verdict_json(verdict: Verdict) -> dict[str, Any]:
    """Return whether and why a step is kept, in the form that ``--json`` prints."""
    return {
        "step": verdict.step,
        "keep": verdict.keep,
        "reasons": [asdict(reason) for reason in verdict.reasons],
    }
