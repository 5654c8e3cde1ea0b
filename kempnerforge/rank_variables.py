"""Environment variables by which the launcher tells a rank its place, and what the rank does with them."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import MutableMapping

LAUNCHER_PID = "KEMPNERFORGE_LAUNCHER_PID"
"""The launcher, without which a rank must not continue. The rank removes it: children are not ranks."""
RESTART_COUNT = "KEMPNERFORGE_RESTART_COUNT"
"""How often the launcher has restarted the ranks."""
STORE_FD = "KEMPNERFORGE_STORE_FD"
"""Rank 0: the socket that listens at MASTER_PORT already. -1 for other ranks."""

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that the launcher forwards. They are blocked in a rank until it has installed its handlers."""

_PR_SET_PDEATHSIG = 1


def die_with_launcher(environ: MutableMapping[str, str] = os.environ) -> None:
    """Have the kernel kill this process when its launcher ends. Do nothing without a launcher.

    A launcher that was killed cannot end its ranks, and nothing else would.
    """
    if launcher := environ.pop(LAUNCHER_PID, ""):
        die_with_parent(int(launcher))


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread of process ``parent`` that started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the call
        os.kill(os.getpid(), signal.SIGKILL)


def receive_signals() -> None:
    """Unblock the signals that the launcher forwards. Those that arrived earlier are delivered now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
