"""End the processes that workers of a user's dataset have started.

Each worker has a session of its own. Processes that it starts belong to it, unless they leave it. If a rank
is killed, the kernel kills its workers, and this module's ``main``, a process of the rank, what they started.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Collection
from pathlib import Path

from kempnerforge.rank_variables import FORWARDED

CHECK_INTERVAL_S = 0.5
TRACKER = b"resource_tracker import main"
"""In the command of a process, of multiprocessing or joblib, that deletes the shared memory of killed ones.
It ends when they have ended."""


def main() -> None:
    """Wait until the rank has ended, then kill what is left of its workers' sessions."""
    for number in FORWARDED:  # the rank ends this process
        signal.signal(number, signal.SIG_IGN)
    rank, *sessions = map(int, sys.argv[1:])
    while os.getppid() == rank:
        time.sleep(CHECK_INTERVAL_S)
    kill_sessions(sessions)


def kill_sessions(sessions: Collection[int]) -> None:
    """Send SIGKILL to all processes of ``sessions``, also to those that they start meanwhile."""
    killed: set[int] = set()
    while new := _processes(sessions) - killed:
        for pid in new:
            with contextlib.suppress(OSError):  # it has ended, or belongs to another user
                os.kill(pid, signal.SIGKILL)
        killed |= new


def _processes(sessions: Collection[int]) -> set[int]:
    """Return the processes of ``sessions``, but for trackers of resources. None without /proc."""
    found: set[int] = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            # The name, in parentheses, may itself contain spaces and parentheses.
            fields = (folder / "stat").read_bytes().rpartition(b")")[2].split()
            if int(fields[3]) in sessions and TRACKER not in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
    return found
