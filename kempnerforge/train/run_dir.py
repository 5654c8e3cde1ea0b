"""What a run's folder says of how its last attempt ended."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kempnerforge.checkpoint.run import metadata, owner
from kempnerforge.errors import KempnerForgeError, RunFolderError

_OF_STORAGE = (errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
"""What a call on an open file says, which names none."""


def record_exit(folder: Path, *, status: int, reason: str, step: int) -> None:
    """Write how this attempt ended; torchrun hides its workers' statuses. Rank 0 only.

    Raises RunFolderError and OSError.
    """
    record = metadata.read(folder)
    if record is None:
        raise FileNotFoundError(errno.ENOENT, "it went away", str(folder / metadata.RUN_FILE))
    last_exit = {
        "status": status,
        "reason": reason,
        "step": step,
        "attempt": record.attempt,
        "time": time.time(),
    }
    metadata.write(folder, replace(record, last_exit=last_exit))


def record_refusal(checkpoints: Path, folder: Path, error: KempnerForgeError) -> None:
    """Write why this attempt ended before its first step: stopped, blocked, refused. Rank 0 only.

    Where that cannot be written ``error`` alone says it.
    """
    with contextlib.suppress(OSError, RunFolderError):
        newest = owner.newest_step(checkpoints, owner.of_folder(checkpoints, folder)) or 0
        record_exit(folder, status=error.exit_status, reason=str(error), step=newest)


def storage_error(error: Exception, folders: Sequence[Path]) -> KempnerForgeError | None:
    """An error of the file system that a run is kept on, as one that is told in a line; None for any other.

    Calls that may fail are tried again, done without or told by name where they are made. This is for the
    rest: a run on a failing disk ends with a line about the disk. ``folders``: where the run keeps its files.
    """
    if not isinstance(error, OSError):
        return None
    name = error.filename if isinstance(error.filename, str) else ""
    is_inside = any(Path(os.path.abspath(name)).is_relative_to(folder.absolute()) for folder in folders)
    if not (is_inside if name else error.errno in _OF_STORAGE):
        return None
    told = KempnerForgeError(f"{error}. Check the file system, then start the same command again")
    told.__cause__ = error
    return told
