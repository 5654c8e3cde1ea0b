"""What a run's folder says of how its last attempt ended."""

from __future__ import annotations

import contextlib
import errno
import time
from dataclasses import replace
from pathlib import Path

from kempnerforge.checkpoint import owner, run_record
from kempnerforge.errors import KempnerForgeError, RunFolderError


def record_exit(folder: Path, *, status: int, reason: str, step: int) -> None:
    """Write how this attempt ended; torchrun hides its workers' statuses. Rank 0 only.

    Raises RunFolderError and OSError.
    """
    record = run_record.read(folder)
    if record is None:
        raise FileNotFoundError(errno.ENOENT, "it went away", str(folder / run_record.RUN_FILE))
    last_exit = {
        "status": status,
        "reason": reason,
        "step": step,
        "attempt": record.attempt,
        "time": time.time(),
    }
    run_record.write(folder, replace(record, last_exit=last_exit))


def record_refusal(checkpoints: Path, folder: Path, error: KempnerForgeError) -> None:
    """Write why this attempt ended before its first step: stopped, blocked, refused. Rank 0 only.

    Where that cannot be written ``error`` alone says it.
    """
    with contextlib.suppress(OSError, RunFolderError):
        newest = owner.newest_step(checkpoints, owner.of_folder(checkpoints, folder)) or 0
        record_exit(folder, status=error.exit_status, reason=str(error), step=newest)
