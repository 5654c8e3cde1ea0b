"""Steps that a user wants kept: ``pins/step_00001000`` in the checkpoint folder, one file a step.

A pin is made beside a run that writes and prunes, by somebody who may write to its folder; nobody else can
make a run keep what its owner pays for. It lies outside of the step's folder, which is never changed after
its commit.

A pin and a deletion may meet. The pin is made first and then the step is looked for; the deletion takes the
step's name away first and then looks for a pin (``retention``). So at least one of the two sees the other:
either the pin reports that the step is gone, or the deletion gives the step back.
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
"""Run id and attempt of a step: a rollback makes room for another one of its number."""


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
    """Of the step that was pinned; unknown for pins of early versions."""

    def is_of(self, origin: Origin | None) -> bool:
        """Whether it is that step's, and not that of an earlier step of the same number."""
        mine = (self.run_id, self.attempt)
        return origin is None or mine == ("", 0) or mine == origin

    def describe(self) -> str:
        """The pin in words."""
        by = f"pinned by {self.user}" if self.user else "pinned"
        return f"{by}: {self.note}" if self.note else by


def pin(folder: Path, step: int, *, note: str = "") -> bool:
    """Keep ``step`` of the checkpoint folder ``folder`` until ``unpin``. False: it was pinned already.

    Durable on return, and the step is there then. Raises StepNotFoundError when there is no such committed
    step, RunFolderError when the folder cannot be written.
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
    """Leave ``step`` to retention again. False: it was not pinned. Raises RunFolderError."""
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
    """The pins in ``folder``, by step, those of steps that are gone included. Any content makes a pin."""
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
    """Run id and attempt of a step; None where its manifest cannot tell."""
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
