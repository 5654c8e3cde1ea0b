"""Pins: files ``pins/step_00001000`` in the checkpoint folder, one for each step that a user wants to keep.

A pin can be created while a run writes and prunes. It requires write access to the checkpoint
folder, so that nobody else can make a run keep data that its owner pays for. It lies outside the
step's folder, which never changes after the commit.

Protocol for a pin and a deletion of one step at the same time:

- ``pin`` first creates the file, and then checks that the step exists.
- The deletion (``pruner``) first renames the step, and then checks for a pin.

So at least one of the two sees the other: either ``pin`` reports that the step was deleted, or the
deletion restores the step's name.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from kempnerforge import fsio
from kempnerforge.checkpoint.format import manifest, paths
from kempnerforge.errors import CheckpointError, RunFolderError, StepNotFoundError

FOLDER = "pins"
Origin = tuple[str, int]
"""Run id and attempt of a step. After a rollback another step may have the same number."""


@dataclass(frozen=True)
class Pin:
    """Who wants a step kept, and why."""

    user: str = ""
    host: str = ""
    time: float = 0.0
    """Seconds since the epoch."""
    note: str = ""
    run_id: str = ""
    attempt: int = 0
    """Attempt of the pinned step. Pins of early versions have neither this nor the run id."""

    def is_of(self, origin: Origin | None) -> bool:
        """Return whether it pins this step, rather than an earlier one of the same number."""
        mine = (self.run_id, self.attempt)
        return origin is None or mine == ("", 0) or mine == origin

    def describe(self) -> str:
        """Return a description of the pin."""
        by = f"pinned by {self.user}" if self.user else "pinned"
        return f"{by}: {self.note}" if self.note else by


def pin(folder: Path, step: int, *, note: str = "") -> bool:
    """Keep ``step`` in the checkpoint folder until ``unpin``. Return False if it was pinned already.

    On return the pin is durable and the step exists. Raises StepNotFoundError if there is no such
    committed step, RunFolderError if the folder cannot be written.
    """
    _require_committed(folder, step)
    path = folder / FOLDER / paths.step_name(step)
    origin = _origin(folder / paths.step_name(step))
    made = Pin(_user(), socket.gethostname(), time.time(), note, *(origin or ("", 0)))
    body = (json.dumps(asdict(made)) + "\n").encode()
    try:
        with contextlib.suppress(FileExistsError):
            fsio.new_folder(path.parent)
        if path.exists() and not _decode(fsio.read_mark(path)).is_of(origin):
            fsio.atomic_write(path, body)
        else:
            fsio.write_new_file(path, body)
        fsio.fsync_folder(path.parent)
        fsio.fsync_folder(folder)
    except FileExistsError:
        return False
    except OSError as error:
        raise RunFolderError(
            f"step {step} was not pinned: {path.parent} cannot be written ({error}). Ask the owner of the "
            "run to pin it, or copy the step's folder"
        ) from error
    try:
        _require_committed(folder, step)
    except StepNotFoundError:
        path.unlink(missing_ok=True)
        raise StepNotFoundError(f"step {step} was deleted while it was being pinned") from None
    return True


def unpin(folder: Path, step: int) -> bool:
    """Let retention delete ``step`` again. Return False if it was not pinned. Raises RunFolderError."""
    path = folder / FOLDER / paths.step_name(step)
    try:
        path.unlink()
        fsio.fsync_folder(path.parent)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise RunFolderError(f"{path} cannot be removed: {error}") from error
    return True


def read(folder: Path) -> dict[int, Pin]:
    """Return the pins in ``folder`` by step, including those of missing steps.

    A file is a pin whatever its content.
    """
    found = {}
    try:
        names = [path.name for path in (folder / FOLDER).iterdir()]
    except FileNotFoundError:
        return {}
    for name in names:
        if (step := paths.step_number(name)) is not None:
            with contextlib.suppress(FileNotFoundError):
                found[step] = _decode(fsio.read_mark(folder / FOLDER / name))
    return found


def _decode(data: bytes) -> Pin:
    try:
        body = json.loads(data)
        origin = (str(body.get("run_id", "")), int(body.get("attempt", 0)))
        return Pin(str(body["user"]), str(body["host"]), float(body["time"]), str(body["note"]), *origin)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return Pin()


def _origin(step_folder: Path) -> Origin | None:
    """Return run id and attempt of a step; None if its manifest cannot be read."""
    try:
        found = manifest.read(step_folder).provenance
    except (CheckpointError, OSError):
        return None
    return found.run_id, found.attempt


def _require_committed(folder: Path, step: int) -> None:
    if not (folder / paths.step_name(step) / paths.MANIFEST).is_file():
        steps = paths.committed_steps(folder)
        known = f"committed: {', '.join(map(str, steps))}" if steps else "none is committed"
        raise StepNotFoundError(f"{folder} has no committed step {step}; {known}")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name
        return ""
