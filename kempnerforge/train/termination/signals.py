"""Signals that ask the run to stop, or to save now. A handler sets a flag and nothing else.

Signals arrive back to back and in the middle of anything, so a handler that logs, saves or talks to other
ranks can crash or deadlock; what to do is decided by all ranks together at the next step.

Python runs handlers in the main thread, between two instructions: while that thread waits in a collective,
none runs. So the interpreter's own handler also writes each signal's number into a socket, at once and from
any thread, and ``shutdown`` reads it there. No torch: signals are taken over before it is imported.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

from kempnerforge.errors import StopRequestedError

T = TypeVar("T")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
PREEMPT_WARNING_SIGNAL = signal.SIGUSR1
"""A warning ahead of time (``sbatch --signal=USR1@300``): it asks for a stop and starts no clock."""

REPEAT_SIGNAL_AFTER_S = 5.0
"""One Ctrl-C reaches a worker twice, from the terminal and from torchrun; SLURM sends CONT and TERM to every
process and torchrun passes TERM on. A signal that comes later than this after the first is meant."""


class StopSignals:
    """Remembers the first stop signal that this process got; any other one replaces an announcement."""

    def __init__(self) -> None:
        self.received = 0
        """Number of the signal; 0 while there is none."""
        self.save_requested = False
        """Whether SIGUSR2 has asked for a save; whoever answers it sets it back."""
        self.arrivals, self._wakeup = socket.socketpair()
        """Readable: a byte for every signal that has come, its number."""
        self._may_interrupt = False

    def install(self) -> None:
        """Take over the stop signals. Main thread only.

        SIGHUP and SIGINT stay ignored where the process was started so: by ``nohup``, or in the background
        of a script.
        """
        self._wakeup.setblocking(False)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            may_be_ignored = number in (signal.SIGHUP, signal.SIGINT)
            if not (may_be_ignored and signal.getsignal(number) is signal.SIG_IGN):
                signal.signal(number, self._handle)
        signal.signal(signal.SIGUSR2, self._request_save)

    def interruptible(self, work: Callable[[], T]) -> T:
        """Run ``work``, which changes nothing that others rely on; a stop signal ends it.

        Raises StopRequestedError, also when the signal has come before. Main thread only.
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
        if self.received in (
            0,
            PREEMPT_WARNING_SIGNAL,
        ):  # what ends the run now says more than what announced it
            self.received = number
        self._interrupt()

    def _request_save(self, _number: int, _frame: FrameType | None) -> None:
        self.save_requested = True


class ShutdownTimer:
    """For how long an orderly end is waited for. Pure: told what came and when, it says what follows.

    Args:
        timeout_s: from the first stop signal, announcements left out, until waiting is over.
        again_after_s: a further one that comes so long after it ends the waiting at once.
    """

    def __init__(self, timeout_s: float, again_after_s: float = REPEAT_SIGNAL_AFTER_S) -> None:
        self._timeout_s = timeout_s
        self._again_after_s = again_after_s
        self._first: tuple[str, float] | None = None
        self._clock: tuple[str, float] | None = None

    @property
    def ends_at(self) -> float | None:
        """When waiting is over; None while nobody waits."""
        return self._clock[1] + self._timeout_s if self._clock else None

    @property
    def timeout_reason(self) -> str:
        """What to say then."""
        name = self._clock[0] if self._clock else ""
        return f"not stopped {self._timeout_s:g} s after {name} (train.shutdown_timeout_s)"

    def arrived(self, number: int, now: float) -> str | None:
        """This process got a signal. Returns why to end at once; None to go on waiting."""
        if number not in STOP_SIGNALS or number == PREEMPT_WARNING_SIGNAL:
            return None
        name = signal.Signals(number).name
        if self._first is None:
            self._first = (name, now)
            self._clock = self._clock or self._first
        elif now - self._first[1] >= self._again_after_s:
            return f"{name} came {now - self._first[1]:.1f} s after {self._first[0]}"
        return None

    def agreed(self, number: int, now: float) -> None:
        """All ranks stop because one of them got a signal: the clock runs on the others too."""
        if number != PREEMPT_WARNING_SIGNAL and self._clock is None:
            self._clock = (signal.Signals(number).name, now)
