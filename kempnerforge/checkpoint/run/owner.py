"""``owner.json``: which run a checkpoint folder belongs to, and which steps in it are that run's.

The file is created exclusively: it is written and synced under a temporary name, and then
hard-linked to ``owner.json``, which fails if that name exists. So of several runs that start at the
same instant, exactly one owns the folder, and a crash leaves the whole file or none. On file
systems without hard links it is opened with O_EXCL instead. Then a crash may leave it truncated,
which the next start reports.

Needs no torch. Only the run that the file names changes it, while it holds its lease.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kempnerforge import fsio
from kempnerforge.checkpoint.format import manifest, paths
from kempnerforge.checkpoint.format.manifest import Provenance
from kempnerforge.checkpoint.run import metadata
from kempnerforge.errors import DamagedCheckpointError, MismatchError, RunFolderError

OWNER_FILE = "owner.json"

_FORMAT = 1
_MAX_BYTES = 1 << 16
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
_READ_FOR_S = 5.0
"""How long to retry a file that cannot be parsed. Without hard links it may just be being written."""


@dataclass(frozen=True)
class Owner:
    """The run that ``owner.json`` names. Without ``run_id`` the run is unknown and owns every step."""

    run_id: str = ""
    run_name: str = ""
    run_dir: str = ""
    """The absolute path of the run's folder when it last started."""
    parent_run_id: str = ""
    parent_step: int | None = None
    """The step that a fork begins with. Its manifest still names the run ``parent_run_id``."""

    def owns(self, provenance: Provenance) -> bool:
        """Return whether a step is this run's.

        Steps of early versions name no run, and belong to the owner.
        """
        if not self.run_id or provenance.run_id in ("", self.run_id):
            return True
        return self.is_parent(provenance.run_id, provenance.step)

    def is_parent(self, run_id: str, step: int | None) -> bool:
        """Return whether this is the step that the run was forked from."""
        return bool(run_id) and (run_id, step) == (self.parent_run_id, self.parent_step)

    def foreign_run(self, folder: Path) -> str:
        """Return the id of the other run that the manifest in ``folder`` names; empty if it names none.

        A missing or damaged manifest names no run: such a step belongs to the folder's owner.
        Raises OSError when the manifest cannot be read: change nothing then, because the step may
        be another run's.
        """
        try:
            # No pause: a save in flight has no manifest yet, and each start looks at what is left of some.
            found = manifest.confirm_damage(lambda: manifest.read(folder), pause_s=0.0).provenance
        except (DamagedCheckpointError, MismatchError):
            return ""
        return "" if self.owns(found) else found.run_id

    def may_own(self, folder: Path) -> bool:
        """Return whether the step in ``folder`` may be this run's; True when its manifest cannot be read."""
        try:
            return not self.foreign_run(folder)
        except OSError:
            return True

    def describe(self) -> str:
        """Return a description of the run."""
        name = f"run {self.run_name} ({self.run_id})" if self.run_name else f"run {self.run_id or 'unknown'}"
        return f"{name}, in {self.run_dir}" if self.run_dir else name


ANYONE = Owner()
"""The owner of a folder whose run is unknown."""


def read(folder: Path) -> Owner | None:
    """Return the owner of ``folder``; None if it has none, or does not exist.

    Raises RunFolderError for a file that cannot be parsed, and OSError.
    """
    deadline = time.monotonic() + _READ_FOR_S
    while True:
        data = _read_bytes(folder / OWNER_FILE)
        if data is None:
            return None
        try:
            return _decode(data)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            if time.monotonic() > deadline:
                raise RunFolderError(
                    f"{folder / OWNER_FILE} cannot be read ({error}), so it is unknown which run these "
                    "checkpoints belong to. If all belong to one run, delete this file: the next start of "
                    "that run creates it again"
                ) from None
        time.sleep(0.1)


def of_folder(folder: Path, run_dir: Path | None = None) -> Owner:
    """Return the owner of ``folder``. Without an owner file: the run in ``run_dir``, or ``ANYONE``.

    Raises RunFolderError and OSError.
    """
    found = read(folder)
    record = metadata.read(run_dir) if found is None and run_dir is not None else None
    if found is not None or record is None:
        return found or ANYONE
    parent = record.parent
    return Owner(
        record.run_id,
        run_dir=str(run_dir),
        parent_run_id=parent.run_id if parent is not None else "",
        parent_step=parent.step if parent is not None else None,
    )


def create(folder: Path, owner: Owner) -> bool:
    """Make ``owner`` the owner of ``folder``. Return False if another process has created the file first.

    Durable on return. Raises OSError.
    """
    path = folder / OWNER_FILE
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        fsio.write_new_file(temporary, encode(owner))
        try:
            os.link(temporary, path)
        except FileNotFoundError:  # a faster process has removed leftovers
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            fsio.write_new_file(path, encode(owner))
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    fsio.fsync_folder(folder)
    return True


def replace_file(folder: Path, owner: Owner) -> None:
    """Replace the file of the same run. Call only while that run's lease is held. Durable on return."""
    fsio.atomic_write(folder / OWNER_FILE, encode(owner))


def encode(owner: Owner) -> bytes:
    """Return the bytes of ``owner.json``."""
    is_fork = owner.parent_step is not None
    body = {
        "format": _FORMAT,
        "run_id": owner.run_id,
        "run_name": owner.run_name,
        "run_dir": owner.run_dir,
        "parent": {"run_id": owner.parent_run_id, "step": owner.parent_step} if is_fork else None,
        "time": time.time(),
    }
    return (json.dumps(body, indent=1) + "\n").encode()


def newest_step(folder: Path, owner: Owner) -> int | None:
    """Return the newest committed step that is not another run's; None without one. Raises OSError."""
    for step in paths.committed_steps(folder):
        if not owner.run_id or owner.may_own(folder / paths.step_name(step)):
            return step
    return None


def _decode(data: bytes) -> Owner:
    body: dict[str, Any] = json.loads(data)
    parent = body.get("parent") or {}
    run_id, step = body["run_id"], parent.get("step")
    if not isinstance(run_id, str) or not run_id or (step is not None and type(step) is not int):
        raise ValueError("it names no run")
    return Owner(
        run_id,
        run_name=str(body.get("run_name", "")),
        run_dir=str(body.get("run_dir", "")),
        parent_run_id=str(parent.get("run_id", "")),
        parent_step=step,
    )


def _read_bytes(path: Path) -> bytes | None:
    """Return the file's bytes; None if it is missing. Never follows a link or waits for a pipe."""
    try:
        return fsio.read_mark(path, _MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
