"""Claim a checkpoint folder for a run, before anything in it is used or changed.

    folder                                              result
    owned by another run, by ``owner.json``             refused, nothing is read
    owned by this run, but run_dir is a copy            refused if the original still exists
    no owner, all steps are this run's                  adopted
    no owner, steps of another run                      refused
    no steps, but the run has committed some            refused (``known_steps``)
    empty or missing                                    created

A refusal changes nothing in the folder.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from kempnerforge import fsio
from kempnerforge.checkpoint.format import manifest, paths
from kempnerforge.checkpoint.format.step_info import StepView
from kempnerforge.checkpoint.run import known_steps, metadata, owner
from kempnerforge.checkpoint.run.metadata import RUN_FILE, RunRecord
from kempnerforge.checkpoint.run.owner import OWNER_FILE, Owner
from kempnerforge.errors import CheckpointError, FolderOwnedError, KempnerForgeError
from kempnerforge.goodput.run_history import RunHistory


@dataclass(frozen=True)
class Hints:
    """How a user gives a run another checkpoint folder, in the words of the caller."""

    rename: str = "give this run another name (--run.name=NEW)"
    placeholder: str = "--checkpoint.dir='{parent}/{{run_name}}'"


def claimant(record: RunRecord, run_dir: Path, run_name: str) -> Owner:
    """Return the run of ``record`` as the owner of a folder. ``run_name``: empty if unknown."""
    parent = record.parent
    return Owner(
        record.run_id,
        run_name=run_name,
        run_dir=os.path.abspath(run_dir),
        parent_run_id=parent.run_id if parent is not None else "",
        parent_step=parent.step if parent is not None else None,
    )


def take(folder: Path, run_id: str, run_dir: Path, *, history: RunHistory | None = None) -> Owner:
    """Claim ``folder`` for the run ``run_id`` in ``run_dir``. Return its owner. ``history``: see ``look``.

    First rank only. A caller without a run id owns nothing, and may only use a folder without an
    owner. Durable on return. Raises FolderOwnedError, StepsMissingError, RunFolderError, OSError.
    """
    record = metadata.read(run_dir) if run_id else None
    if record is None or record.run_id != run_id:
        record = RunRecord(run_id, run_id, 0.0)
    mine = claimant(record, run_dir, "")
    return settle(folder, mine, look(folder, mine, run_dir, history=history))


def look(
    folder: Path,
    mine: Owner,
    run_dir: Path,
    *,
    was_in: Path | None = None,
    hints: Hints | None = None,
    history: RunHistory | None = None,
) -> Owner | None:
    """Refuse a ``folder`` that ``mine`` may not claim. Return its owner; None if it has none yet.

    ``was_in``: where the run's checkpoints were at its last start. ``history``: that of the run, if
    the caller has it. Changes nothing. Raises what ``take`` raises.
    """
    hints = hints or Hints()
    found = owner.read(folder)
    if found is not None:
        _require_same_run(folder, found, mine, hints)
    else:
        _require_adoptable(folder, mine, hints)
    known_steps.require_known(folder, run_dir, _merged(found, mine), was_in=was_in, history=history)
    return found


def settle(folder: Path, mine: Owner, found: Owner | None, hints: Hints | None = None) -> Owner:
    """Make ``mine`` the owner of a folder that ``look`` has checked. Raises what ``take`` raises.

    ``mine.run_id`` must be in ``run.json``, durably: an owner file with the id of no run would
    refuse every run.
    """
    hints = hints or Hints()
    if not mine.run_id:
        return mine
    if found is None:
        fsio.make_folder(folder)
        mine = replace(mine, run_name=mine.run_name or Path(mine.run_dir).name)
        if owner.create(folder, mine):
            return mine
        found = owner.read(folder)
        if found is None:
            raise FileNotFoundError(f"{folder / OWNER_FILE} disappeared while it was created")
        _require_same_run(folder, found, mine, hints)
    merged = _merged(found, mine)
    if merged != found:
        owner.replace_file(folder, merged)
    return merged


def require_own(folder: Path, record: RunRecord, run_dir: Path) -> Owner:
    """Return the owner of a run's checkpoint folder, for commands. Changes nothing.

    Raises FolderOwnedError if it belongs to another run, RunFolderError, OSError.
    """
    mine, found = claimant(record, run_dir, ""), owner.read(folder)
    if found is None:
        return mine
    if found.run_id != record.run_id:
        raise FolderOwnedError(
            f"{folder} holds the checkpoints of {found.describe()}, not of {mine.describe()}. Give the "
            "folder of that run"
        )
    return _merged(found, mine)


def _merged(found: Owner | None, mine: Owner) -> Owner:
    """Return what to write to the file: the run's current folder, and the parent of ``mine`` or ``found``."""
    if found is None:
        return mine
    merged = replace(mine, run_name=mine.run_name or found.run_name)
    if merged.parent_step is None:
        merged = replace(merged, parent_run_id=found.parent_run_id, parent_step=found.parent_step)
    return merged


def _require_same_run(folder: Path, found: Owner, mine: Owner, hints: Hints) -> None:
    if found.run_id == mine.run_id:
        if _is_copy(folder, found, mine):
            raise FolderOwnedError(
                f"{folder} holds the checkpoints of {found.describe()}. {mine.run_dir} is a copy of that "
                f"run's folder, and two runs must not write one checkpoint folder. {_ways_on(folder, hints)}"
            )
        return
    if mine.run_dir and found.run_dir and is_same(found.run_dir, mine.run_dir):
        raise FolderOwnedError(
            f"{folder} holds the checkpoints of {found.describe()}. {RUN_FILE} there names another run, "
            f"{mine.run_id}: it was lost or replaced. Restore the {RUN_FILE} of {found.run_id}. Or: "
            f"{_ways_on(folder, hints)}"
        )
    raise _refusal(folder, found.describe(), mine, hints)


def _refusal(folder: Path, whose: str, mine: Owner, hints: Hints) -> FolderOwnedError:
    return FolderOwnedError(
        f"{folder} holds the checkpoints of another run: {whose}. This is {mine.describe()}. Nothing was "
        f"changed. {_ways_on(folder, hints)}"
    )


def _ways_on(folder: Path, hints: Hints) -> str:
    placeholder = hints.placeholder.format(parent=folder.absolute().parent)
    return (
        f"To continue: {hints.rename}, or its own checkpoint folder ({placeholder}). To start a new run "
        f"from one of the steps there: kempnerforge ckpt fork {folder / paths.LATEST} NEW_RUN"
    )


def _require_adoptable(folder: Path, mine: Owner, hints: Hints) -> None:
    """Refuse a folder without an owner file that has a step of another run."""
    if not mine.run_id:
        return
    foreign: dict[str, list[Path]] = {}
    listing = paths.list_folder(folder)
    steps = [folder / paths.step_name(step) for step in listing.steps]
    own = 0
    for path in (*steps, *known_steps.set_aside(listing)):
        try:
            found = manifest.read(path).provenance
        except CheckpointError:  # damaged, or of another format version: the resume reports it
            continue
        if mine.owns(found):
            own += 1
        else:
            foreign.setdefault(found.run_id, []).append(path)
    if not foreign:
        return
    runs = [f"{_name_of(folders[0], run_id)} ({_names(folders)})" for run_id, folders in foreign.items()]
    if own or len(runs) > 1:
        whose = f"{' and '.join(runs)}{', beside steps of this one' if own else ''}. Its owner is unknown"
        raise FolderOwnedError(
            f"{folder} holds checkpoints of several runs: {whose}. This is {mine.describe()}. Nothing was "
            f"changed. Move the steps of all but one run elsewhere. Or: {_ways_on(folder, hints)}"
        )
    raise _refusal(folder, runs[0], mine, hints)


def _name_of(path: Path, run_id: str) -> str:
    """Describe the run of a step, with the name in the step's config."""
    try:
        name = StepView.open(path).config().get("run", {}).get("name", "")
    except (CheckpointError, OSError, AttributeError):
        name = ""
    return Owner(run_id, run_name=str(name)).describe()


def _names(folders: list[Path]) -> str:
    shown = ", ".join(path.name for path in folders[:3])
    return f"{shown} and {len(folders) - 3} more" if len(folders) > 3 else shown


def _is_copy(folder: Path, found: Owner, mine: Owner) -> bool:
    """Return whether ``mine`` is a copy of a run whose original folder has its checkpoints here."""
    if not found.run_dir or not mine.run_dir or is_same(found.run_dir, mine.run_dir):
        return False
    try:
        run_dir = Path(found.run_dir)
        record = metadata.read(run_dir)
    except (KempnerForgeError, OSError):
        return False
    if record is None or record.run_id != mine.run_id:
        return False
    return is_same(record.checkpoint_folder(run_dir), folder)


def is_same(first: str | Path, second: str | Path) -> bool:
    """Return whether two paths lead to the same folder."""
    try:
        return os.path.samefile(first, second)
    except OSError:  # one of them no longer exists
        return os.path.realpath(first) == os.path.realpath(second)
