"""One writer: who may write a run's folder, and how another process takes over when it is gone.

The lease of attempt 7 is the file ``lease.7.json`` in the run's folder; the highest number holds the run.
Taking the lease, free or taken over, is one ``open(O_CREAT | O_EXCL)`` of the next number. POSIX, and NFS
from version 3 on, make that succeed for exactly one process. So of several that judge a lease stale one wins,
and there is no moment without a holder.

No lease file is ever replaced or renamed: a process that slept through its own replacement could wake up and
put its old lease over the new one. Here it cannot, because a holder writes only to the descriptor that it got
when it created the file, and its successor unlinks that file. Giving the lease back does not unlink it: the
file then says that it was released and stays, so that its number is not taken a second time.

A process that found number 7 stale and then slept could create number 8 after others created 8 and 9 and
unlinked 8. So a new holder looks once more, and a number that is not the highest is no lease.

The holder's thread moves a counter in its file. Other hosts judge a lease by that counter alone, each on its
own monotonic clock, because clocks of two hosts do not agree. The counter is written in place: no new file is
needed, so a full disk or quota does not make a live run look dead.
"""

from __future__ import annotations

import errno
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from kempnerforge import fsio, process_identity
from kempnerforge.errors import LeaseHeldError, LeaseLostError, RunFolderError
from kempnerforge.process_identity import ProcessIdentity

RENEW_EVERY_S = 3.0
STALE_AFTER_S = 30.0
"""Ten renewals: an overloaded file system may delay some. A fence makes even a wrong takeover harmless."""
_LOOK_EVERY_S = 0.5
_MOST_LOOKS = 180
"""At a lease that is listed and missing: NFS caches a listing for 60 s."""
_RELEASE_TRIES = 2

_LEASE = re.compile(r"lease\.(\d+)\.json")


class _Seen(NamedTuple):
    attempt: int
    data: bytes


class Lease:
    """A lease that is held. A thread renews it until ``release``; a process that dies leaves it behind."""

    def __init__(
        self, path: Path, fd: int, owner: ProcessIdentity, *, renew_every_s: float, took_over: str
    ) -> None:
        self.path = path
        self.owner = owner
        self.took_over = took_over
        """Whose lease this one ended, and why that was allowed; empty when it was free."""
        self.lost = ""
        """Why this is no longer the lease, as soon as that is known. A loop that sees it stops."""
        self.failing = ""
        """Why renewing fails at present. The lease is held all the same until another process takes over."""
        self._fd = fd
        self._counter = 0
        self._renew_every_s = renew_every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    @property
    def attempt(self) -> int:
        """The number of this attempt: no other attempt of the run has it."""
        return self.owner.attempt

    def check(self) -> None:
        """Return when this is still the lease. Stands before every commit. Any thread.

        Raises LeaseLostError when another attempt has taken over, or the file is gone; OSError as it comes.
        """
        run_dir = self.path.parent
        unread, is_own = None, True
        try:
            # By name, not by the descriptor: on NFS that asks the server, and a successor has unlinked it.
            is_own = self._is_own_file()
        except OSError as error:  # the folder may still tell of a successor
            unread = error
        if not is_own:
            self.lost = f"{self.path} was removed, which the next holder of {run_dir} does, or moved"
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
        """Give the lease back, so that the next start need not wait. Does nothing the second time."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        try:
            for _ in range(_RELEASE_TRIES):
                try:
                    self._write(released=True)
                    break
                except OSError as error:  # then the next start watches the lease for a while
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
                # After a failed write too: on NFS it fails for ever once a successor has unlinked the file.
                self.check()
            except LeaseLostError:
                return
            except OSError as error:
                failed = failed or error
            self.failing = str(failed or "")

    def _write(self, *, released: bool) -> None:
        self._counter += 1
        os.pwrite(self._fd, process_identity.encode(self.owner, counter=self._counter, released=released), 0)
        # Not for durability: it is what makes NFS send the bytes to the server.
        os.fdatasync(self._fd)


def acquire(
    run_dir: Path,
    *,
    after_attempt: int = 0,
    stale_after_s: float = STALE_AFTER_S,
    renew_every_s: float = RENEW_EVERY_S,
    note: Callable[[str], None] = lambda _text: None,
    rename_hint: str = "give this run another name (--run.name=NEW)",
    rank_pids: Sequence[int] = (),
) -> Lease:
    """Take the lease of the run in ``run_dir``, which must exist. Its attempt is above ``after_attempt``.

    Returns at once when the lease is free, its process has ended on this host, or it belongs to an earlier
    start of this SLURM job. Otherwise watches its counter, and tells ``note`` so. Of a run's processes only
    one calls this: rank 0. ``rename_hint`` says in errors how to give the run another folder.
    ``rank_pids``: the processes of all ranks on this host; the error of a refused start names them.

    Raises LeaseHeldError when the counter moves within ``stale_after_s``, RunFolderError when the folder
    cannot be written.
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
                note(f"{_name(newest)} may still write {run_dir}; watching it for up to {stale_after_s:g} s")
            elif watch.moved(newest):
                raise _held(run_dir, newest, me, rename_hint)
            elif watch.still_s >= stale_after_s:
                free = f"its lease has not moved for {stale_after_s:g} s"
        if free is None:
            time.sleep(_LOOK_EVERY_S)
            continue
        attempt = max(after_attempt, newest.attempt if newest else 0) + 1
        claimed = _claim(run_dir, replace(me, attempt=attempt), note)
        if claimed is not None:
            took_over = f"{_name(newest)}: {free}" if newest and free else ""
            return Lease(*claimed, renew_every_s=renew_every_s, took_over=took_over)


class _Watch:
    """For how long a lease has been seen not to move, on this process's own clock."""

    def __init__(self) -> None:
        self.still_s = 0.0
        self._seen: _Seen | None = None
        self._looked = 0.0

    def is_new(self, newest: _Seen) -> bool:
        """Begin to watch ``newest`` unless it is watched already."""
        if self._seen is not None and self._seen.attempt == newest.attempt:
            return False
        self._seen, self._looked, self.still_s = newest, time.monotonic(), 0.0
        return True

    def moved(self, newest: _Seen) -> bool:
        """Look again; adds to ``still_s`` when nothing has changed."""
        now = time.monotonic()
        # A look that took long proves nothing: storage that hangs for both lets a live holder look dead.
        self.still_s += min(now - self._looked, 2 * _LOOK_EVERY_S)
        self._looked = now
        return self._seen != newest


def live_holder(run_dir: Path) -> str:
    """Who may hold the lease, as far as one look can tell; empty when it is free. Changes nothing."""
    newest = _read_newest(run_dir)
    return _name(newest) if newest and _why_free(newest, ProcessIdentity.of_this_process(0)) is None else ""


def _why_free(newest: _Seen | None, me: ProcessIdentity) -> str | None:
    """Why the lease may be taken at once; empty when nobody has it, None when it may not be taken at once."""
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


def _claim(
    run_dir: Path, owner: ProcessIdentity, note: Callable[[str], None]
) -> tuple[Path, int, ProcessIdentity] | None:
    """Create the lease file of ``owner.attempt``; None when another process was faster."""
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
            _remove_older([file for attempt, file in leases.items() if attempt < owner.attempt], note)
            return path, fd, owner
        error = None
    except OSError as failed:
        error = failed
    os.close(fd)
    path.unlink(missing_ok=True)
    if error is not None:
        raise RunFolderError(f"{run_dir} cannot be written: {error}") from error
    return None


def _remove_older(files: list[Path], note: Callable[[str], None]) -> None:
    """Remove the leases of older attempts. One that stays does no harm: its holder looks for newer ones."""
    try:
        fsio.remove_all(files)
    except OSError as error:
        note(f"the lease of an older attempt could not be removed: {error}")


def _leases(run_dir: Path) -> dict[int, Path]:
    found = {}
    for name in os.listdir(run_dir):
        if match := _LEASE.fullmatch(name):
            found[int(match[1])] = run_dir / name
    return found


def _read_newest(run_dir: Path) -> _Seen | None:
    """The highest lease; None when there is none.

    Raises OSError, also when a lease that is listed stays missing: nobody knows then who holds it.
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
        # It was unlinked meanwhile, so it has a successor, which a cached listing may show late.
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
