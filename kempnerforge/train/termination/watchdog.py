"""End a process that was asked to stop and does not, after printing its stacks.

A thread waits on the socket to which the interpreter writes every signal. It thus sees a signal
while the main thread is blocked in a collective, a CUDA synchronisation or a read, all of which
release the interpreter lock. For code that does not release it, the thread also sets the timer of
``stack_dump`` at the first signal. That timer ends the process from C. (If the lock is already held
forever *before* the first signal, only the launcher can end the process: torchrun and SLURM kill it
after 30 s. The timer of the hang detector still prints the stacks.)

Ending a process at once corrupts nothing: a step is committed by one rename, which either happened
or did not.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable

from kempnerforge.errors import EXIT_STOPPED
from kempnerforge.train.hangs.stack_dump import Stacks
from kempnerforge.train.termination import signals
from kempnerforge.train.termination.signals import ShutdownTimer, StopSignals

_AGREED = 128
"""Added to the number of a signal that another rank received."""
_CLOSE = 0
"""Ends the thread. It is no signal. The end of the pipe would not do: a child that a dataset of the user's
has forked holds it open."""
_EXIT_TIMEOUT_S = 5.0
"""The longest that ending may take, including writing the stacks and the reason."""


class Shutdown:
    """Enforces the end of one process.

    Args:
        stop_signals: the signals of the process, which are installed already. Earlier signals are
            seen too.
        timeout_s: time from the first stop signal until the process is ended.
        stacks: writes the stacks.
    """

    def __init__(self, stop_signals: StopSignals, *, timeout_s: float, stacks: Stacks) -> None:
        self.on_exit: Callable[[str], None] = lambda _reason: None
        """Called with the reason before the process ends, on a thread, for a few seconds at most."""
        self._arrivals = stop_signals.arrivals
        self._stacks = stacks
        self._timeout_s = timeout_s
        self._timer = ShutdownTimer(timeout_s, signals.REPEAT_SIGNAL_AFTER_S)
        self._wake_fd, self._waker_fd = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._watch, name="shutdown", daemon=True)
        self._thread.start()

    def agreed(self, number: int) -> None:
        """Start the timer when all ranks stop because of this signal, also if another rank received it."""
        os.write(self._waker_fd, bytes([_AGREED + number]))

    def close(self) -> None:
        """End the thread after an orderly stop. Main thread only."""
        os.write(self._waker_fd, bytes([_CLOSE]))
        self._thread.join()
        os.close(self._waker_fd)
        os.close(self._wake_fd)
        signal.set_wakeup_fd(-1)
        self._stacks.disarm()

    def _watch(self) -> None:
        armed = False
        while True:
            ends_at = self._timer.ends_at
            if ends_at is not None and not armed:
                armed = True
                self._stacks.end_process_in(self._timeout_s + _EXIT_TIMEOUT_S)
            left_s = None if ends_at is None else max(0.0, ends_at - time.monotonic())
            ready, _, _ = select.select([self._arrivals, self._wake_fd], [], [], left_s)
            if not ready:
                self._end(self._timer.timeout_reason)
            for source in ready:
                data = os.read(source if isinstance(source, int) else source.fileno(), 64)
                if _CLOSE in data:
                    return
                for number in data:
                    self._take(number)

    def _take(self, number: int) -> None:
        now = time.monotonic()
        if number >= _AGREED:
            self._timer.agreed(number - _AGREED, now)
        elif why := self._timer.arrived(number, now):
            self._end(why)

    def _end(self, why: str) -> None:
        self._stacks.end_process_in(_EXIT_TIMEOUT_S)
        self._stacks.to_stderr(f"{why}, so this process ends now")
        self._stacks.to_file(why)
        try:
            self.on_exit(why)
        finally:
            os._exit(EXIT_STOPPED)
