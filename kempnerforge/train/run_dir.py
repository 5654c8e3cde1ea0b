"""Record in the run's folder how the last attempt ended, and report errors of its file system."""

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
"""Errors of calls on an open file. Their exceptions contain no path."""


def record_exit(folder: Path, *, status: int, reason: str, step: int) -> None:
    """Write how this attempt ended, because torchrun hides the statuses of its workers. Rank 0 only.

    Raises RunFolderError and OSError.
    """
    record = metadata.read(folder)
    if record is None:
        raise FileNotFoundError(errno.ENOENT, "it has been removed", str(folder / metadata.RUN_FILE))
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

    A failure to write it is ignored, because ``error`` itself is printed.
    """
    with contextlib.suppress(OSError, RunFolderError):
        newest = owner.newest_step(checkpoints, owner.of_folder(checkpoints, folder)) or 0
        record_exit(folder, status=error.exit_status, reason=str(error), step=newest)


def storage_error(error: Exception, folders: Sequence[Path]) -> KempnerForgeError | None:
    """Convert an error of the run's file system into one that is reported in one line, or return None.

    Most callers retry, skip or report a failed call themselves. This function is for all other
    calls, so that a run on a failing disk ends with a line about the disk. ``folders`` are those
    with the files of the run.
    """
    if not isinstance(error, OSError):
        return None
    name = error.filename if isinstance(error.filename, str) else ""
    is_inside = any(Path(os.path.abspath(name)).is_relative_to(folder.absolute()) for folder in folders)
    if not (is_inside if name else error.errno in _OF_STORAGE):
        return None
    converted = KempnerForgeError(f"{error}. Check the file system, then start the same command again")
    converted.__cause__ = error
    return converted
