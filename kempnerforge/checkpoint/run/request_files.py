"""Request files in the run's folder, by which users and scripts send requests to a run. Needs no torch.

One thread of the first rank checks for them once per second. The training loop reads only flags: a
check is a round trip on a shared file system, which may take seconds, and all ranks would wait.
"""

from __future__ import annotations

import logging
import stat
import threading
import time
import weakref
from pathlib import Path

from kempnerforge import fsio
from kempnerforge.printable import printable

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
_MAX_TEXT_BYTES = 4096

_Identity = tuple[int, int, int]


class RequestFile:
    """One request file. ``RequestFiles.look`` reads and removes it, on another thread.

    Failures are logged as warnings, never raised. Only a regular file is a request: a folder or a link of
    that name is reported once and ignored. So is an answered request that cannot be removed, until
    it changes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._warned: set[str] = set()
        self.is_there = False
        """Whether there is an unanswered request."""
        self.text = ""
        """The printable first line of the last file seen."""
        self._seen: _Identity | None = None
        self._answered: _Identity | None = None
        self._take_any = False
        self._lock = threading.Lock()

    def take(self, *, unseen: bool = False) -> str:
        """Answer the request, so that the file is removed soon. Return its text. Never blocks.

        A file that is created or touched afterwards is a new request. ``unseen``: also remove a
        file that has not been seen yet.
        """
        with self._lock:
            self.is_there, self._answered = False, self._seen
            self._take_any = unseen
            return self.text

    @property
    def is_settled(self) -> bool:
        """Whether no known file remains to be removed."""
        return self._answered is None and not self._take_any

    def look(self) -> None:
        """Check for the file, read it, and remove it if it was answered. Never raises."""
        found, text = self._find(), ""
        if found is not None:
            text = self.text if found == self._seen else _first_line(self.path)
        with self._lock:
            answered = found is not None and (found == self._answered or self._take_any)
            if not answered:
                # A file that could not be removed stays answered: it is not a second request.
                self.is_there = found is not None and (self.is_there or found != self._seen)
                self._answered = None
            self._seen, self.text, self._take_any = found, text, False
        if answered:
            try:
                self.path.unlink(missing_ok=True)
            except OSError as error:
                why = error.strerror or error
                self._warn_once(f"{self.path} cannot be removed ({why}); it is ignored until it changes")
            with self._lock:
                self._answered = None

    def _find(self) -> _Identity | None:
        try:
            status = self.path.lstat()
        except OSError:
            return None
        if stat.S_ISREG(status.st_mode):
            return (status.st_dev, status.st_ino, status.st_mtime_ns)
        self._warn_once(f"{self.path} is not a regular file, so it is ignored")
        return None

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            log.warning(text)


class RequestFiles:
    """Watches files in ``run_dir`` on a daemon thread, until it is closed or garbage-collected."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._files: list[RequestFile] = []
        self._wake = threading.Event()
        self._is_closed = False

    def watch(self, name: str, *, look_now: bool = False) -> RequestFile:
        """Watch ``name`` from now on. ``look_now``: first check for it on the calling thread."""
        file = RequestFile(self._run_dir / name)
        if look_now:
            file.look()
        self._files.append(file)
        if len(self._files) == 1:
            args = (weakref.ref(self), self._wake)
            threading.Thread(target=_look_again, args=args, name="request-files", daemon=True).start()
        return file

    def look(self) -> bool:
        """Check all files once. Return whether to continue."""
        for file in list(self._files):
            file.look()
        return not self._is_closed

    def close(self, timeout_s: float = LOOK_EVERY_S) -> None:
        """Stop watching. First wait at most ``timeout_s`` until answered files are removed."""
        until = time.monotonic() + timeout_s
        while not all(file.is_settled for file in self._files) and time.monotonic() < until:
            self._wake.set()
            time.sleep(0.005)
        self._is_closed = True
        self._wake.set()


def _look_again(watched: weakref.ref[RequestFiles], wake: threading.Event) -> None:
    while (files := watched()) is not None and files.look():
        del files  # do not keep a dropped manager alive
        wake.wait(LOOK_EVERY_S)
        wake.clear()


def _first_line(path: Path) -> str:
    """Return the printable first line of a file that is not a link or a pipe; empty without one."""
    try:
        lines = fsio.read_mark(path, _MAX_TEXT_BYTES).decode(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return printable(lines[0]) if lines else ""
