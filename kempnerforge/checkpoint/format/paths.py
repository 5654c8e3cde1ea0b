"""Names of files and folders in a checkpoint folder, and listings of it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

MANIFEST = "manifest.json"
INDEX = "index.bin"
TRAIN_STATE = "train_state.json"
CONFIG = "config.toml"
LATEST = "latest"
SHARD_SUFFIX = ".safetensors"
MODEL_PREFIX = "model."
"""The prefix of a model's tensor names in a checkpoint."""

_MORE_LISTINGS = 4

_STEP = re.compile(r"step_(\d{8,})")
_TEMPORARY = re.compile(r"\.step_(\d{8,})\.(\d+)\.tmp")
_DELETING = re.compile(r"\.step_(\d{8,})(\.\d+(\.tmp(\.\d+)?)?)?\.deleting")
_SET_ASIDE = re.compile(r"(quarantined|rolledback|late|suspect)\.step_(\d{8,})\.(\d+)")


def local_path(path: str | os.PathLike[str]) -> Path:
    """Return ``path`` as an absolute path.

    Raise ValueError for a URL, which would name a local folder ``s3:``.
    """
    if "://" in os.fspath(path):
        raise ValueError(f"{path}: checkpoints are on a mounted file system; give a path, not a URL")
    return Path(os.path.abspath(path))


def step_name(step: int) -> str:
    """Return the folder name of a committed step."""
    return f"step_{step:08d}"


def step_number(name: str) -> int | None:
    """Return the step whose committed folder has exactly this name; None for any other name."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match and name == step_name(int(match[1])) else None


def is_set_aside(name: str) -> bool:
    """Return whether ``name`` is that of a step that was set aside, for whatever reason."""
    return _SET_ASIDE.fullmatch(name) is not None


def temporary_name(final_name: str, attempt: int) -> str:
    """Return the hidden name of a checkpoint in flight. The attempt in it shows who writes it."""
    return f".{final_name}.{attempt}.tmp"


def quarantine_name(step: int, number: int) -> str:
    """Return the name of a step that was set aside as damaged."""
    return f"quarantined.{step_name(step)}.{number}"


def rolled_back_name(step: int, number: int) -> str:
    """Return the name of a step that was set aside by a rollback to an older one."""
    return f"rolledback.{step_name(step)}.{number}"


def late_name(step: int, number: int) -> str:
    """Return the name of a step that an attempt committed after it had been replaced."""
    return f"late.{step_name(step)}.{number}"


def suspect_name(step: int, number: int) -> str:
    """Return the name of a step that was set aside as suspect: see ``FolderListing.suspect``."""
    return f"suspect.{step_name(step)}.{number}"


def fenced_name(temporary: str, attempt: int) -> str:
    """Return the hidden name that ``attempt`` gives an older attempt's checkpoint in flight to delete it."""
    return f"{temporary}.{attempt}.deleting"


def shard_name(number: int, count: int) -> str:
    """Return the name of the ``number``-th of ``count`` shard files."""
    return f"shard_{number:05d}_of_{count:05d}{SHARD_SUFFIX}"


@dataclass
class FolderListing:
    """The content of a checkpoint folder, by name. Files with other names are not listed."""

    steps: list[int] = field(default_factory=list)
    """Steps with their final name, newest first. Not checked yet."""
    temporary: list[tuple[Path, int]] = field(default_factory=list)
    """Checkpoints in flight, with the attempt that writes each."""
    deleting: list[Path] = field(default_factory=list)
    """Folders whose deletion was interrupted."""
    quarantined: list[Path] = field(default_factory=list)
    """Steps that were set aside as damaged."""
    rolled_back: list[Path] = field(default_factory=list)
    """Steps that a rollback set aside."""
    late: list[Path] = field(default_factory=list)
    """Steps set aside because their attempt had been replaced before it committed them."""
    suspect: list[Path] = field(default_factory=list)
    """Steps set aside because two attempts resumed from them and failed. The state may be the cause."""


def list_folder(folder: Path) -> FolderListing:
    """List ``folder``. A missing folder is empty. Symbolic links are ignored.

    If a step disappears during the scan, list again: a newer one may have been missed.
    """
    found, is_whole = _list_once(folder)
    for _ in range(_MORE_LISTINGS):
        if is_whole:
            break
        found, is_whole = _list_once(folder)
    return found


def _list_once(folder: Path) -> tuple[FolderListing, bool]:
    """Return a listing, and whether no step disappeared during the scan."""
    found, is_whole = FolderListing(), True
    if not folder.is_dir():
        return found, True
    # scandir returns the type of each entry without a call per entry, which is a round trip on a network
    # file system. Steps are examined after the whole listing, so that one that disappeared is noticed.
    with os.scandir(folder) as entries:
        listed = list(entries)
    for entry in listed:
        name, step = entry.name, step_number(entry.name)
        if entry.is_symlink() or not entry.is_dir(follow_symlinks=False):
            is_whole &= step is None or os.path.lexists(entry)
        elif step is not None:
            if _is_ours(entry.path):
                found.steps.append(step)
            else:
                is_whole &= os.path.lexists(entry)
        elif match := _TEMPORARY.fullmatch(name):
            found.temporary.append((folder / name, int(match[2])))
        elif _DELETING.fullmatch(name):
            found.deleting.append(folder / name)
        elif match := _SET_ASIDE.fullmatch(name):
            kind = {"rolledback": "rolled_back"}.get(match[1], match[1])
            getattr(found, kind).append(folder / name)
    found.steps.sort(reverse=True)
    return found, is_whole


def set_aside_steps(folder: Path) -> list[int]:
    """Return the committed steps that were set aside as damaged or suspect."""
    listing = list_folder(folder)
    names = [path.name.split(".")[1] for path in (*listing.quarantined, *listing.suspect)]
    return [step for name in names if (step := step_number(name)) is not None]


def committed_steps(folder: Path) -> list[int]:
    """Return the committed steps, newest first. They have their final name and a manifest."""
    return [step for step in list_folder(folder).steps if (folder / step_name(step) / MANIFEST).is_file()]


def _is_ours(step_folder: str) -> bool:
    """Return whether a folder with a step's name contains any file of a checkpoint.

    A checkpoint that lost its manifest must be reported as damaged. Other folders are ignored.
    """
    if os.path.lexists(f"{step_folder}/{MANIFEST}"):
        return True
    try:
        names = os.listdir(step_folder)
    except FileNotFoundError:  # it was deleted since it was listed
        return False
    return any(name in (INDEX, TRAIN_STATE) or name.endswith(SHARD_SUFFIX) for name in names)
