"""Start an attempt: identify the run, take its lease, count the attempt, and check the shared folder."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kempnerforge import fsio
from kempnerforge.checkpoint.format import manifest, paths
from kempnerforge.checkpoint.run import claim, lineage, metadata, owner
from kempnerforge.checkpoint.run.claim import Hints
from kempnerforge.checkpoint.run.lease import Lease, acquire
from kempnerforge.checkpoint.run.metadata import RUN_FILE, RunRecord
from kempnerforge.checkpoint.run.resume_report import read_receipts
from kempnerforge.config.checkpoint import fill_dir
from kempnerforge.config.path_text import expand
from kempnerforge.distributed.consensus import ControlGroup
from kempnerforge.errors import (
    DamagedCheckpointError,
    FolderOwnedError,
    KempnerForgeError,
    MismatchError,
    RunFolderError,
    StepsMissingError,
)
from kempnerforge.goodput.run_history import RunHistory
from kempnerforge.process_identity import process_state, restart_count
from kempnerforge.rank_variables import RESTART_COUNT

log = logging.getLogger(__name__)

_NONCE_WAIT_S = 10.0
"""How long a rank waits for the first rank's file. Network file systems may show a new file late."""


@dataclass(frozen=True)
class OpenOptions:
    """What differs between callers of ``open_run``: terms in messages, what to adopt, what is known."""

    folder_name: str = "run.dir"
    """The user's term for the run's folder."""
    other_folder: str = "--run.dir=SHARED/PATH"
    """How the user gives another one."""
    rename_hint: str = "give this run another name (--run.name=NEW)"
    """How the user gives the run another name."""
    adopt: bool = False
    """Whether to adopt checkpoints that have no ``run.json``, instead of refusing them."""
    checkpoints: Hints = Hints()  # noqa: RUF009 - frozen
    """How the user gives the run another checkpoint folder."""
    history: RunHistory | None = None
    """The history of the run in ``folder``, if the caller uses it later too."""


def open_run(
    folder: Path,
    control: ControlGroup,
    *,
    first_global_batch_size: int,
    checkpoint_dir: str | None = None,
    run_name: str = "",
    options: OpenOptions | None = None,
) -> tuple[RunRecord, Lease | None]:
    """Start a new attempt of the run in ``folder``, which the first start creates.

    The first rank takes the run's lease and returns it. The other ranks return None. The checkpoint
    folder is claimed for the run before anything in it is used (see ``claim``).

    Collective: all ranks.
    Blocks: while it watches another process's lease.
    Durable: on return.

    Args:
        folder: the run's folder.
        control: the control group.
        first_global_batch_size: recorded at the first start.
        checkpoint_dir: ``checkpoint.dir``. The absolute path is recorded, for commands on the
            folder.
        run_name: replaces ``{run_name}`` in ``checkpoint_dir``; empty for the name of ``folder``.
        options: what differs between callers.

    Raises on all ranks RunFolderError, LeaseHeldError if another process writes to the run,
    FolderOwnedError if the checkpoint folder is another run's, StepsMissingError if the run's steps
    are missing.
    """
    options = options or OpenOptions()
    wanted = _Wanted(checkpoint_dir or "", run_name or Path(os.path.abspath(folder)).name)
    leases: list[Lease] = []

    ranks = control.gather((socket.gethostname(), os.getpid()))
    rank_pids = [pid for host, pid in ranks if host == ranks[0][0]]

    def begin() -> tuple[RunRecord, str]:
        lease, record, nonce = _begin_attempt(folder, first_global_batch_size, wanted, rank_pids, options)
        leases.append(lease)
        return record, nonce

    record, nonce = control.run_on_rank0(begin)
    try:
        control.raise_on_any_error(_missing_nonce(folder, nonce, options))
        control.run_on_rank0(lambda: _remove_nonce(folder / _nonce_name(nonce)))
    except BaseException:
        for lease in leases:
            lease.release()
        raise
    return record, leases[0] if leases else None


def start_facts(hosts: Sequence[str], layout_of_run: Mapping[str, int]) -> dict[str, Any]:
    """Return the content of the ledger's ``start`` event, without the time."""
    return {
        "hosts": list(hosts),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID", ""),
        "slurm_restart_count": restart_count(os.environ),
        "layout": dict(layout_of_run),
    }


def attempt_started(environ: Mapping[str, str] = os.environ) -> float:
    """Return when this process started, or the launcher that started it, as Unix time.

    A batch script may write a stop request as soon as it has started the launcher, seconds before
    the ranks run.
    """
    is_launched = "TORCHELASTIC_RUN_ID" in environ or RESTART_COUNT in environ
    pids = [os.getpid(), *([os.getppid()] if is_launched else [])]
    since_boot_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    starts = [time.time()]
    for pid in pids:
        if state := process_state(pid):
            starts.append(time.time() - since_boot_s + state.start_ticks / os.sysconf("SC_CLK_TCK"))
    return min(starts)


def _begin_attempt(
    folder: Path,
    first_global_batch_size: int,
    wanted: _Wanted,
    rank_pids: Sequence[int],
    options: OpenOptions,
) -> tuple[Lease, RunRecord, str]:
    try:
        fsio.make_folder(folder)
        known = _identity_of(folder, wanted) if options.adopt else _Identity()
        if not options.adopt and metadata.read(folder) is None and (folder / "checkpoints").exists():
            steps = paths.committed_steps(folder / "checkpoints")
            fork = ""
            if steps:
                newest = folder / "checkpoints" / paths.step_name(max(steps))
                fork = f", start a new run from them (kempnerforge ckpt fork {newest} NEW_RUN)"
            raise RunFolderError(
                f"{folder} has checkpoints but no {RUN_FILE}, so their run is unknown. Restore "
                f"{RUN_FILE}{fork}, or give the run another name (--run.name=NEW)"
            )
        after_attempt = max(lineage.last_attempt(folder), known.last_attempt)
        lease = acquire(
            folder,
            after_attempt=after_attempt,
            rename_hint=options.rename_hint,
            rank_pids=rank_pids,
        )
        if lease.took_over:
            log.info(f"took the run over from {lease.took_over}")
        try:
            _remove_leftovers(folder)
            # Read it again: the former holder of the lease may have written it meanwhile.
            record = metadata.read(folder) or known.new_record()
            record = replace(
                record,
                attempt=lease.attempt,
                global_batch_size=record.global_batch_size or first_global_batch_size,
            )
            record = _take_checkpoints(folder, record, wanted, options)
            nonce = secrets.token_hex(8)
            fsio.write_new_file(folder / _nonce_name(nonce), nonce.encode())
        except BaseException:
            lease.release()
            raise
    except OSError as error:
        raise RunFolderError(f"{options.folder_name}: {folder} cannot be used: {error}") from error
    return lease, record, nonce


@dataclass(frozen=True)
class _Wanted:
    """Where the config puts the checkpoints, with placeholders."""

    checkpoint_dir: str
    run_name: str

    def moved_to(self, run_id: str) -> str:
        """Return the absolute path; empty for ``checkpoints/`` in the run's folder."""
        filled = fill_dir(self.checkpoint_dir, run_name=self.run_name, run_id=run_id)
        return os.path.abspath(expand(filled, key="checkpoint.dir")) if filled else ""


def _take_checkpoints(folder: Path, record: RunRecord, wanted: _Wanted, options: OpenOptions) -> RunRecord:
    """Claim the checkpoint folder, and write ``run.json``. Return the new record.

    The order matters: an owner file must never have an id that is not in ``run.json``, and
    ``run.json`` must never name a folder that is not the run's.
    """
    moved_to = wanted.moved_to(record.run_id)
    checkpoints = Path(moved_to) if moved_to else folder / "checkpoints"
    mine = claim.claimant(record, folder, wanted.run_name)
    was_in = record.checkpoint_folder(folder)
    try:
        found = claim.look(
            checkpoints, mine, folder, was_in=was_in, hints=options.checkpoints, history=options.history
        )
        metadata.write(folder, record)
        claim.settle(checkpoints, mine, found, options.checkpoints)
    except (FolderOwnedError, StepsMissingError) as error:
        _record_refusal(folder, record, error)
        raise
    if record.checkpoint_dir != moved_to:
        record = replace(record, checkpoint_dir=moved_to)
        metadata.write(folder, record)
    return record


def _record_refusal(folder: Path, record: RunRecord, error: KempnerForgeError) -> None:
    """Record why this attempt ended. A refused first start leaves no ``run.json``."""
    if metadata.read(folder) is None:
        return
    last_exit = {
        "status": error.exit_status,
        "reason": str(error),
        "step": 0,
        "attempt": record.attempt,
        "time": time.time(),
    }
    metadata.write(folder, replace(record, last_exit=last_exit))


@dataclass(frozen=True)
class _Identity:
    """The identity of a run without ``run.json``, by its checkpoints."""

    run_id: str = ""
    last_attempt: int = 0

    def new_record(self) -> RunRecord:
        """Return a new record, with the id in the checkpoints if all have the same."""
        record = metadata.new()
        return replace(record, run_id=self.run_id, timeline_id=self.run_id) if self.run_id else record


def _identity_of(folder: Path, wanted: _Wanted) -> _Identity:
    if metadata.read(folder) is not None or "{run_id}" in wanted.checkpoint_dir:
        return _Identity()
    moved_to = wanted.moved_to("")
    checkpoints = Path(moved_to) if moved_to else folder / "checkpoints"
    owned_by = owner.read(checkpoints)
    if moved_to and owned_by is None and not read_receipts(folder):
        return _Identity()  # this run never started, so the steps there are another run's
    if moved_to and owned_by is not None and not claim.is_same(owned_by.run_dir, folder):
        return _Identity()
    found = []
    for step in paths.committed_steps(checkpoints):
        try:
            found.append(manifest.read(checkpoints / paths.step_name(step)).provenance)
        except (DamagedCheckpointError, MismatchError):
            continue  # the resume reports it
    if owned_by is not None:
        own = [provenance.attempt for provenance in found if provenance.run_id == owned_by.run_id]
        return _Identity(owned_by.run_id, max(own, default=0))
    names = {provenance.run_id for provenance in found}
    attempts = [provenance.attempt for provenance in found]
    return _Identity(names.pop() if len(names) == 1 else "", max(attempts, default=0))


def _remove_leftovers(folder: Path) -> None:
    """Remove leftovers of killed attempts. An error does not end the start."""
    try:
        fsio.remove_leftovers(folder / RUN_FILE)
        fsio.remove_all(list(folder.glob(_nonce_name("*"))))
    except OSError as error:
        log.warning(f"a leftover of an earlier attempt could not be removed: {error}")


def _remove_nonce(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:  # the next start removes it
        log.warning(f"{path} could not be removed: {error}")


def _nonce_name(nonce: str) -> str:
    return f".nonce-{nonce}"


def _missing_nonce(folder: Path, nonce: str, options: OpenOptions) -> RunFolderError | None:
    """Return an error if this rank does not see the file that the first rank has written to ``folder``."""
    deadline = time.monotonic() + _NONCE_WAIT_S
    while True:
        with contextlib.suppress(OSError):
            if fsio.read_file(folder / _nonce_name(nonce)) == nonce.encode():
                return None
        if time.monotonic() > deadline:
            where = f"{folder.absolute()} on {socket.gethostname()}"
            return RunFolderError(
                f"{options.folder_name}: {where} is not the folder that rank 0 sees. "
                f"It must be on a file system that all nodes share: set {options.other_folder}"
            )
        time.sleep(0.2)
