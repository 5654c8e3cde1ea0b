"""A run's folder: whose it is, which attempt this is, and whether all ranks see the same one."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from kempnerforge import fsio
from kempnerforge.checkpoint import layout, run_record, timeline
from kempnerforge.checkpoint.lease import Lease, acquire
from kempnerforge.checkpoint.run_record import RUN_FILE, RunRecord
from kempnerforge.distributed.control import ControlGroup
from kempnerforge.errors import KempnerForgeError, RunFolderError

_NONCE_WAIT_S = 10.0
"""Network file systems may show another node's new file late."""


def open_run(
    folder: Path,
    control: ControlGroup,
    *,
    first_global_batch_size: int,
    checkpoint_dir: str | None = None,
    note: Callable[[str], None] = lambda _text: None,
) -> tuple[RunRecord, Lease | None]:
    """Begin a new attempt of the run in ``folder``, which is made at the first start.

    The first rank takes the run's lease, which it gets back; the others get None. ``checkpoint_dir`` is where
    the config moves the checkpoints to, which commands on the folder must know.

    Collective: all ranks. Blocks: while another process's lease is watched (``note`` is told). Durable: on
    return. Raises RunFolderError on all ranks, LeaseHeldError when another process writes the run.
    """
    moved_to = os.path.abspath(os.path.expanduser(checkpoint_dir)) if checkpoint_dir else ""
    leases: list[Lease] = []

    def begin() -> tuple[RunRecord, str]:
        lease, record, nonce = _begin_attempt(folder, first_global_batch_size, moved_to, note)
        leases.append(lease)
        return record, nonce

    record, nonce = control.on_rank0(begin)
    try:
        control.raise_together(_missing_nonce(folder, nonce))
        control.on_rank0(lambda: (folder / _nonce_name(nonce)).unlink())
    except BaseException:
        for lease in leases:
            lease.release()
        raise
    return record, leases[0] if leases else None


def record_exit(folder: Path, *, status: int, reason: str, step: int) -> None:
    """Write how this attempt ended; torchrun hides its workers' statuses. Rank 0 only."""
    record = run_record.read(folder)
    assert record is not None
    last_exit = {
        "status": status,
        "reason": reason,
        "step": step,
        "attempt": record.attempt,
        "time": time.time(),
    }
    run_record.write(folder, replace(record, last_exit=last_exit))


def record_refusal(checkpoints: Path, folder: Path, error: KempnerForgeError) -> None:
    """Write why this attempt ended before its first step: stopped, blocked, refused. Rank 0 only."""
    newest = max(layout.committed_steps(checkpoints), default=0)
    record_exit(folder, status=error.exit_status, reason=str(error), step=newest)


def _begin_attempt(
    folder: Path, first_global_batch_size: int, checkpoint_dir: str, note: Callable[[str], None]
) -> tuple[Lease, RunRecord, str]:
    try:
        fsio.make_folder(folder)
        if run_record.read(folder) is None and (folder / "checkpoints").exists():
            raise RunFolderError(
                f"{folder} has checkpoints but no {RUN_FILE}: it is not known whose they are. Put "
                f"{RUN_FILE} back, or give the run another name (--run.name=NEW)"
            )
        lease = acquire(folder, after_attempt=timeline.last_attempt(folder), note=note)
        if lease.took_over:
            note(f"took the run over from {lease.took_over}")
        try:
            _remove_leftovers(folder)
            # Read again: whoever held the lease may have written it in the meantime.
            record = run_record.read(folder) or run_record.new()
            record = replace(
                record,
                attempt=lease.attempt,
                global_batch_size=record.global_batch_size or first_global_batch_size,
                checkpoint_dir=checkpoint_dir,
            )
            run_record.write(folder, record)
            nonce = secrets.token_hex(8)
            fsio.write_new_file(folder / _nonce_name(nonce), nonce.encode())
        except BaseException:
            lease.release()
            raise
    except OSError as error:
        raise RunFolderError(f"run.dir: {folder} cannot be used: {error}") from error
    return lease, record, nonce


def _remove_leftovers(folder: Path) -> None:
    """What earlier attempts were killed in the middle of."""
    fsio.remove_leftovers(folder / RUN_FILE)
    for path in folder.glob(_nonce_name("*")):
        path.unlink(missing_ok=True)


def _nonce_name(nonce: str) -> str:
    return f".nonce-{nonce}"


def _missing_nonce(folder: Path, nonce: str) -> RunFolderError | None:
    deadline = time.monotonic() + _NONCE_WAIT_S
    while True:
        try:
            if (folder / _nonce_name(nonce)).read_text() == nonce:
                return None
        except OSError:
            if time.monotonic() > deadline:
                return RunFolderError(
                    f"run.dir: {folder.absolute()} on {socket.gethostname()} is not the folder that rank 0 "
                    "sees. It must be on a file system that all nodes share: set --run.dir=SHARED/PATH"
                )
            time.sleep(0.2)
