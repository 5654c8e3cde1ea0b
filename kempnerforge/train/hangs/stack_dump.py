"""Write the stacks of a rank's threads to standard error, and to a file in the run's folder."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from pathlib import Path

from kempnerforge import fsio

FOLDER = "stacks"
_STDERR = 2


def file_name(attempt: int, rank: str) -> str:
    """Return a name such as ``attempt_3.rank_00012.txt``. ``rank`` may be a pattern."""
    return f"attempt_{attempt}.rank_{rank}.txt"


class Stacks:
    """Writes the stacks of all Python threads of this process. May be called from any thread.

    It also manages the one timer of ``faulthandler``. That timer runs in C without the interpreter
    lock, so it works even when an extension never releases the lock and no Python thread can run.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._path: Path | None = None
        self._lock = threading.Lock()
        self._ending = False

    def open(self, run_dir: Path, attempt: int) -> None:
        """Set the path of the file. The file is created when stacks are written, which is rare."""
        self._path = run_dir / FOLDER / file_name(attempt, f"{self._rank:05d}")

    def to_stderr(self, why: str) -> None:
        """Print the stacks."""
        os.write(_STDERR, f"\nrank {self._rank}: {why}; the stacks of all its threads:\n".encode())
        faulthandler.dump_traceback(_STDERR, all_threads=True)

    def to_file(self, why: str) -> Path | None:
        """Append the stacks to this rank's file. Return its path, or None without a file."""
        if self._path is None:
            return None
        try:
            with contextlib.suppress(FileExistsError):
                fsio.new_folder(self._path.parent)
            fd = fsio.open_file(self._path, os.O_WRONLY | os.O_APPEND)
            try:
                os.write(fd, f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} {why}\n".encode())
                faulthandler.dump_traceback(fd, all_threads=True)
            finally:
                os.close(fd)
        except OSError as error:
            os.write(_STDERR, f"rank {self._rank}: {self._path} cannot be written: {error}\n".encode())
            return None
        return self._path

    def print_unless_called_again(self, within_s: float) -> None:
        """Print the stacks after ``within_s`` seconds, unless this is called again earlier.

        A thread calls it regularly. If it does not, no Python thread can run.
        """
        with self._lock:
            if not self._ending:
                faulthandler.dump_traceback_later(within_s, file=_STDERR)

    def end_process_in(self, seconds: float) -> None:
        """Print the stacks and end the process with status 1 after ``seconds``, unless ``disarm``ed."""
        with self._lock:
            self._ending = True
            faulthandler.dump_traceback_later(seconds, exit=True, file=_STDERR)

    def disarm(self) -> None:
        """Stop both timers."""
        with self._lock:
            self._ending = True
            faulthandler.cancel_dump_traceback_later()
