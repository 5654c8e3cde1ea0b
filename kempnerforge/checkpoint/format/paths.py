"""Names inside a checkpoint folder, and what is found there."""

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
"""What the names of a model's tensors begin with in a checkpoint."""

_MORE_LISTINGS = 4

_STEP = re.compile(r"step_(\d{8,})")
_TEMPORARY = re.compile(r"\.step_(\d{8,})\.(\d+)\.tmp")
_DELETING = re.compile(r"\.step_(\d{8,})(\.\d+(\.tmp(\.\d+)?)?)?\.deleting")
_SET_ASIDE = re.compile(r"(quarantined|rolledback|late|suspect)\.step_(\d{8,})\.(\d+)")


def local_path(path: str | os.PathLike[str]) -> Path:
    """``path`` as an absolute path. Raises ValueError for a URL: it would name a local folder ``s3:``."""
    if "://" in os.fspath(path):
        raise ValueError(f"{path}: checkpoints are on a mounted file system; give a path, not a URL")
    return Path(os.path.abspath(path))


def step_name(step: int) -> str:
    """Folder name of a committed step."""
    return f"step_{step:08d}"


def step_number(name: str) -> int | None:
    """The step whose committed folder has this very name; None for any other name."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match and name == step_name(int(match[1])) else None


def is_set_aside(name: str) -> bool:
    """Whether ``name`` is that of a step that was set aside: damaged, rolled back or late."""
    return _SET_ASIDE.fullmatch(name) is not None


def temporary_name(final_name: str, attempt: int) -> str:
    """Hidden name of a checkpoint in flight; it carries the attempt so that a sweep can tell whose it is."""
    return f".{final_name}.{attempt}.tmp"


def quarantine_name(step: int, number: int) -> str:
    """Name that a damaged step is set aside under."""
    return f"quarantined.{step_name(step)}.{number}"


def rolled_back_name(step: int, number: int) -> str:
    """Name that a sound step is set aside under when the run goes back to an older one."""
    return f"rolledback.{step_name(step)}.{number}"


def late_name(step: int, number: int) -> str:
    """Name that a step is set aside under when an attempt that was taken over committed it all the same."""
    return f"late.{step_name(step)}.{number}"


def suspect_name(step: int, number: int) -> str:
    """Name that a step is set aside under when two attempts ended right after it for a cause in the state."""
    return f"suspect.{step_name(step)}.{number}"


def fenced_name(temporary: str, attempt: int) -> str:
    """Hidden name that ``attempt`` gives a checkpoint in flight of an older attempt, before it deletes it."""
    return f"{temporary}.{attempt}.deleting"


def shard_name(number: int, count: int) -> str:
    """Name of the ``number``-th of ``count`` shard files."""
    return f"shard_{number:05d}_of_{count:05d}{SHARD_SUFFIX}"


@dataclass
class FolderListing:
    """What a checkpoint folder holds, by our names; anything else in it is not ours and is left alone."""

    steps: list[int] = field(default_factory=list)
    """Steps under their final name, newest first. Not checked yet."""
    temporary: list[tuple[Path, int]] = field(default_factory=list)
    """Folders in flight, with the attempt that made them."""
    deleting: list[Path] = field(default_factory=list)
    """Folders whose deletion was cut short."""
    quarantined: list[Path] = field(default_factory=list)
    """Steps that were set aside as damaged."""
    rolled_back: list[Path] = field(default_factory=list)
    """Steps that a rollback set aside."""
    late: list[Path] = field(default_factory=list)
    """Steps that were set aside because their attempt had been taken over before it committed them."""
    suspect: list[Path] = field(default_factory=list)
    """Steps that were set aside because two attempts ended right after them for a cause in the state."""


def list_folder(folder: Path) -> FolderListing:
    """List ``folder``; one that does not exist is empty. Symbolic links are never ours.

    A step that goes away meanwhile made way for a newer one, which may be missing too: then it lists again.
    """
    found, is_whole = _list_once(folder)
    for _ in range(_MORE_LISTINGS):
        if is_whole:
            break
        found, is_whole = _list_once(folder)
    return found


def _list_once(folder: Path) -> tuple[FolderListing, bool]:
    """A listing, and whether all steps in it were still there when they were looked at."""
    found, is_whole = FolderListing(), True
    if not folder.is_dir():
        return found, True
    # scandir tells kinds without asking for each: on a network file system every question is a round trip.
    # Steps are looked at when the listing is whole, so that one that is missing from it is noticed.
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
    """Steps that were committed and set aside as damaged or suspect."""
    listing = list_folder(folder)
    names = [path.name.split(".")[1] for path in (*listing.quarantined, *listing.suspect)]
    return [step for name in names if (step := step_number(name)) is not None]


def committed_steps(folder: Path) -> list[int]:
    """Steps that are committed: under their final name, with a manifest. Newest first."""
    return [step for step in list_folder(folder).steps if (folder / step_name(step) / MANIFEST).is_file()]


def _is_ours(step_folder: str) -> bool:
    """Whether a folder with a step's name holds anything that a checkpoint has.

    A folder of ours that lost its manifest is damaged and must be told; a foreign one is not ours to judge.
    """
    if os.path.lexists(f"{step_folder}/{MANIFEST}"):
        return True
    try:
        names = os.listdir(step_folder)
    except FileNotFoundError:  # it was deleted since it was listed
        return False
    return any(name in (INDEX, TRAIN_STATE) or name.endswith(SHARD_SUFFIX) for name in names)
