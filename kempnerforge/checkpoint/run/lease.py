"""The lease: only one process at a time may write a run's folder. Another one takes over when it is dead.

The lease of attempt 7 is the file ``lease.7.json`` in the run's folder. The highest number is the
lease.

**At most one process takes a lease.** To take it, free or stale, a process creates the file of the
next number with ``open(O_CREAT | O_EXCL)``. On POSIX file systems, and on NFS from version 3 on,
that succeeds for exactly one process. So of several processes that consider a lease stale, one
wins, and at no moment is the run without a holder.

**A replaced holder cannot overwrite a newer lease.** No lease file is ever replaced or renamed: a
process that was suspended while it was replaced could wake up and put its old lease over the new
one. Instead, a holder writes only to the descriptor from its own creation of the file, and its
successor unlinks that file. Releasing a lease does not unlink it. The file then says "released" and
remains, so that its number is not used twice.

**A late claim is not a lease.** A process may find number 7 stale, be suspended, and create number
8 after others have created 8 and 9 and unlinked 8. So a new holder lists the leases once more: a
number that is not the highest is not a lease.

**A live holder is not taken for dead.** The holder's thread increments a counter in its file. Other
hosts judge the lease only by that counter, each on its own monotonic clock, because the clocks of
two hosts differ. The counter is written in place. That needs no new file, so a full disk or quota
does not make a live run look dead.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from kempnerforge import fsio, process_identity
from kempnerforge.errors import LeaseHeldError, LeaseLostError, RunFolderError
from kempnerforge.process_identity import ProcessIdentity

log = logging.getLogger(__name__)

RENEW_EVERY_S = 3.0
STALE_AFTER_S = 30.0
"""Ten renewals, because an overloaded file system may delay some. Even a wrong takeover is
harmless: the new holder revokes checkpoints in flight."""
_LOOK_EVERY_S = 0.5
_MOST_LOOKS = 180
"""How often to read a lease that is listed but missing. NFS caches a listing for 60 s."""
_RELEASE_TRIES = 2

_LEASE = re.compile(r"lease\.(\d+)\.json")


class _Seen(NamedTuple):
    attempt: int
    data: bytes


class Lease:
    """A lease that this process holds.

    A thread renews it until ``release``. If the process dies, the file remains and becomes stale.
    """

    def __init__(
        self, path: Path, fd: int, owner: ProcessIdentity, *, renew_every_s: float, took_over: str
    ) -> None:
        self.path = path
        self.owner = owner
        self.took_over = took_over
        """Whose lease this one replaced, and why that was allowed; empty if it was free."""
        self.lost = ""
        """Why this is no longer the lease, once that is known. The loop then stops."""
        self.failing = ""
        """Why renewing fails now. The lease is still held until another process takes over."""
        self._fd = fd
        self._counter = 0
        self._renew_every_s = renew_every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    @property
    def attempt(self) -> int:
        """The number of this attempt, unique in the run."""
        return self.owner.attempt

    def check(self) -> None:
        """Raise LeaseLostError if this is no longer the lease. Thread-safe.

        Called before every commit. The lease is lost if another attempt has taken over, or if its
        file is missing. Also raises OSError.
        """
        run_dir = self.path.parent
        unread, is_own = None, True
        try:
            # Read by name, not through the descriptor: on NFS that queries the server, where a successor has
            # unlinked the file.
            is_own = self._is_own_file()
        except OSError as error:  # the listing may still show a successor
            unread = error
        if not is_own:
            self.lost = f"{self.path} was removed, as the next holder of {run_dir} does, or moved"
        elif (newest := max(_leases(run_dir), default=0)) > self.attempt:
            self.lost = f"attempt {newest} has taken {run_dir} over"
        elif unread is not None:
            raise unread
        if self.lost:
            raise LeaseLostError(
                f"{self.lost}. Attempt {self.attempt} (pid {self.owner.pid} on {self.owner.host}) "
                "commits nothing any more"
            )

    def release(self) -> None:
        """Release the lease, so that the next start does not have to wait. A second call does nothing."""
        if self._ended.is_set():
            return
        self._ended.set()
        log.debug("releasing the lease %s", self.path)
        self._thread.join()
        try:
            for _ in range(_RELEASE_TRIES):
                try:
                    self._write(released=True)
                    break
                except OSError as error:  # the next start then watches the lease for a while
                    self.failing = str(error)
        finally:
            os.close(self._fd)

    def _is_own_file(self) -> bool:
        try:
            return self.owner.token.encode() in fsio.read_mark(self.path)
        except FileNotFoundError:
            return False

    def _renew(self) -> None:
        while not self._ended.wait(self._renew_every_s):
            failed = None
            try:
                self._write(released=False)
            except OSError as error:
                failed = error
            try:
                # Also after a failed write: on NFS, all writes fail once a successor has unlinked the file.
                self.check()
            except LeaseLostError:
                return
            except OSError as error:
                failed = failed or error
            self.failing = str(failed or "")
            if failed is not None:
                log.debug("the lease could not be renewed: %s", failed)

    def _write(self, *, released: bool) -> None:
        self._counter += 1
        os.pwrite(self._fd, process_identity.encode(self.owner, counter=self._counter, released=released), 0)
        # Not for durability, but so that NFS sends the bytes to the server.
        os.fdatasync(self._fd)


def acquire(
    run_dir: Path,
    *,
    after_attempt: int = 0,
    stale_after_s: float = STALE_AFTER_S,
    renew_every_s: float = RENEW_EVERY_S,
    rename_hint: str = "give this run another name (--run.name=NEW)",
    rank_pids: Sequence[int] = (),
) -> Lease:
    """Take the lease of the run in ``run_dir``, which must exist. First rank only.

    Returns at once if the lease is free, if its process has ended on this host, or if it belongs to
    an earlier start of this SLURM job. Otherwise watches its counter.

    Args:
        run_dir: the run's folder.
        after_attempt: the new attempt's number is higher than this.
        stale_after_s: how long the counter must not move before the lease is taken over.
        renew_every_s: interval between renewals.
        rename_hint: how to give the run another folder, for errors.
        rank_pids: the processes of all ranks on this host, which the error of a refused start
            names.

    Raises LeaseHeldError if the counter moves, RunFolderError if the folder cannot be written.
    """
    me = replace(ProcessIdentity.of_this_process(0), rank_pids=rank_pids)
    watch = _Watch()
    while True:
        try:
            newest = _read_newest(run_dir)
        except OSError as error:
            raise RunFolderError(f"{run_dir} cannot be read: {error}") from error
        free = _why_free(newest, me)
        if free is None:
            assert newest is not None
            if watch.is_new(newest):
                log.warning(
                    f"{_name(newest)} may still write {run_dir}; watching it for up to {stale_after_s:g} s"
                )
            elif watch.moved(newest):
                raise _held(run_dir, newest, me, rename_hint)
            elif watch.still_s >= stale_after_s:
                free = f"its lease has not moved for {stale_after_s:g} s"
        if free is None:
            time.sleep(_LOOK_EVERY_S)
            continue
        attempt = max(after_attempt, newest.attempt if newest else 0) + 1
        claimed = _claim(run_dir, replace(me, attempt=attempt))
        if claimed is not None:
            log.debug("took the lease %s", claimed[0])
            took_over = f"{_name(newest)}: {free}" if newest and free else ""
            return Lease(*claimed, renew_every_s=renew_every_s, took_over=took_over)


class _Watch:
    """Measures how long the counter of a lease has not moved, on this process's own clock."""

    def __init__(self) -> None:
        self.still_s = 0.0
        self._seen: _Seen | None = None
        self._looked = 0.0

    def is_new(self, newest: _Seen) -> bool:
        """Start to watch ``newest``. Return False if it is watched already."""
        if self._seen is not None and self._seen.attempt == newest.attempt:
            return False
        self._seen, self._looked, self.still_s = newest, time.monotonic(), 0.0
        return True

    def moved(self, newest: _Seen) -> bool:
        """Return whether the lease has moved. If not, add to ``still_s``."""
        now = time.monotonic()
        # A slow read proves nothing: storage that hangs for both processes makes a live holder look dead.
        self.still_s += min(now - self._looked, 2 * _LOOK_EVERY_S)
        self._looked = now
        return self._seen != newest


def live_holder(run_dir: Path) -> str:
    """Return who may hold the lease, judged by one read; empty if it is free. Changes nothing."""
    newest = _read_newest(run_dir)
    return _name(newest) if newest and _why_free(newest, ProcessIdentity.of_this_process(0)) is None else ""


def _why_free(newest: _Seen | None, me: ProcessIdentity) -> str | None:
    """Return why the lease may be taken at once; empty if nobody holds it, None if it may not."""
    found = process_identity.decode(newest.data) if newest else None
    if newest is None or (found and found[1]):
        return ""
    if found is None:
        return None
    if found[0].has_ended(me):
        return "its process has ended"
    if found[0].is_superseded_by(me):
        return "its SLURM job has been restarted"
    return None


def _claim(run_dir: Path, owner: ProcessIdentity) -> tuple[Path, int, ProcessIdentity] | None:
    """Create the lease file of ``owner.attempt``. Return None if another process was faster."""
    path = run_dir / f"lease.{owner.attempt}.json"
    try:
        fd = fsio.open_file(path, os.O_RDWR | os.O_EXCL)
    except FileExistsError:
        return None
    except OSError as error:
        raise RunFolderError(f"{run_dir} cannot be written: {error}") from error
    try:
        os.pwrite(fd, process_identity.encode(owner, counter=0, released=False), 0)
        os.fsync(fd)
        leases = _leases(run_dir)
        if max(leases) == owner.attempt:
            _remove_older([file for attempt, file in leases.items() if attempt < owner.attempt])
            return path, fd, owner
        error = None
    except OSError as failed:
        error = failed
    os.close(fd)
    path.unlink(missing_ok=True)
    if error is not None:
        raise RunFolderError(f"{run_dir} cannot be written: {error}") from error
    return None


def _remove_older(files: list[Path]) -> None:
    """Remove the leases of older attempts.

    A leftover does no harm, because its holder checks for newer ones.
    """
    try:
        fsio.remove_all(files)
    except OSError as error:
        log.warning(f"the lease of an older attempt could not be removed: {error}")


def _leases(run_dir: Path) -> dict[int, Path]:
    found = {}
    for name in os.listdir(run_dir):
        if match := _LEASE.fullmatch(name):
            found[int(match[1])] = run_dir / name
    return found


def _read_newest(run_dir: Path) -> _Seen | None:
    """Return the lease with the highest number; None if there is none.

    Raises OSError, also if a listed lease remains missing: its holder is then unknown.
    """
    failed = OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(run_dir))
    for _ in range(_MOST_LOOKS):
        if not (leases := _leases(run_dir)):
            return None
        attempt = max(leases)
        try:
            return _Seen(attempt, fsio.read_mark(leases[attempt]))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            failed = error
        # It was unlinked meanwhile, so it has a successor. A cached listing may show it late.
        time.sleep(_LOOK_EVERY_S)
    raise failed


def _name(newest: _Seen) -> str:
    found = process_identity.decode(newest.data)
    return found[0].describe() if found else f"attempt {newest.attempt} (its lease cannot be read)"


def _held(run_dir: Path, newest: _Seen, me: ProcessIdentity, rename_hint: str) -> LeaseHeldError:
    found = process_identity.decode(newest.data)
    stop = f" ({found[0].stop_command(me)})" if found else ""
    return LeaseHeldError(
        f"{run_dir} is being written by {_name(newest)}. Two attempts in one folder would destroy each "
        f"other's checkpoints. Stop that one first{stop}, or {rename_hint}"
    )
