"""Signals that request a stop or a save. A handler only sets a flag.

Signals may arrive at any time and in quick succession, so a handler that logs, saves or
communicates with other ranks can crash or deadlock. All ranks decide together, after the current
step, what to do.

Python runs handlers in the main thread, between two instructions, so none runs while that thread
waits in a collective. The interpreter's own handler therefore also writes each signal's number to a
socket, at once and from any thread, and ``watchdog`` reads it there. This module does not import
torch, because signals must be handled before that import.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

from kempnerforge.errors import StopRequestedError
from kempnerforge.forked_children import leave_signals_to_parent

T = TypeVar("T")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
PREEMPT_WARNING_SIGNAL = signal.SIGUSR1
"""An early warning (``sbatch --signal=USR1@300``): a stop request that does not start the shutdown timer."""

REPEAT_SIGNAL_AFTER_S = 5.0
"""A signal this long after the first one is a new request. Earlier ones may be copies of the first:
one Ctrl-C reaches a worker twice, from the terminal and from torchrun, and SLURM sends CONT and
TERM to every process, while torchrun forwards TERM."""


class StopSignals:
    """Records the first stop signal of this process. A later signal replaces an early warning only."""

    def __init__(self) -> None:
        self.received = 0
        """Number of the signal; 0 while there is none."""
        self.save_requested = False
        """Whether SIGUSR2 has requested a save. The code that handles the request resets it."""
        self.arrivals, self._wakeup = socket.socketpair()
        """A socket to read from: one byte for every signal, its number."""
        self._may_interrupt = False

    def install(self) -> None:
        """Install handlers for the stop signals. Main thread only.

        SIGHUP and SIGINT remain ignored if they were ignored when the process started: under
        ``nohup``, or in the background of a script.
        """
        self._wakeup.setblocking(False)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            may_be_ignored = number in (signal.SIGHUP, signal.SIGINT)
            if not (may_be_ignored and signal.getsignal(number) is signal.SIG_IGN):
                signal.signal(number, self._handle)
        signal.signal(signal.SIGUSR2, self._request_save)
        leave_signals_to_parent((*STOP_SIGNALS, signal.SIGUSR2))

    def interruptible(self, work: Callable[[], T]) -> T:
        """Run ``work``, which a stop signal may interrupt because nothing else depends on its effects.

        Raises StopRequestedError, also for a signal that arrived earlier. Main thread only.
        """
        self._may_interrupt = True
        try:
            self._interrupt()
            return work()
        finally:
            self._may_interrupt = False

    def _interrupt(self) -> None:
        if self._may_interrupt and self.received:
            self._may_interrupt = False
            raise StopRequestedError(signal.Signals(self.received).name)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        # The signal that ends the run is a better reason than the early warning about it.
        if self.received in (0, PREEMPT_WARNING_SIGNAL):
            self.received = number
        self._interrupt()

    def _request_save(self, _number: int, _frame: FrameType | None) -> None:
        self.save_requested = True


class ShutdownTimer:
    """Decides when a graceful shutdown has timed out. It depends only on its arguments.

    Args:
        timeout_s: time-out, counted from the first stop signal that is not an early warning.
        again_after_s: another signal this long after the first one ends the shutdown at once.
    """

    def __init__(self, timeout_s: float, again_after_s: float = REPEAT_SIGNAL_AFTER_S) -> None:
        self._timeout_s = timeout_s
        self._again_after_s = again_after_s
        self._first: tuple[str, float] | None = None
        self._clock: tuple[str, float] | None = None

    @property
    def ends_at(self) -> float | None:
        """When the shutdown times out. None while there is none."""
        return self._clock[1] + self._timeout_s if self._clock else None

    @property
    def timeout_reason(self) -> str:
        """The message for a time-out."""
        name = self._clock[0] if self._clock else ""
        return f"not stopped {self._timeout_s:g} s after {name} (train.shutdown_timeout_s)"

    def arrived(self, number: int, now: float) -> str | None:
        """Record a signal to this process. Return why to end at once, or None to continue waiting."""
        if number not in STOP_SIGNALS or number == PREEMPT_WARNING_SIGNAL:
            return None
        name = signal.Signals(number).name
        if self._first is None:
            self._first = (name, now)
            self._clock = self._clock or self._first
        elif now - self._first[1] >= self._again_after_s:
            return f"{name} arrived {now - self._first[1]:.1f} s after {self._first[0]}"
        return None

    def agreed(self, number: int, now: float) -> None:
        """Start the timer on every rank when all ranks stop because one of them got a signal."""
        if number != PREEMPT_WARNING_SIGNAL and self._clock is None:
            self._clock = (signal.Signals(number).name, now)
