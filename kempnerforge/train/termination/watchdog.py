"""Ends a process that was asked to stop and does not: with its stacks, and never in silence.

A thread waits on the socket that the interpreter writes every signal into, so it hears of a signal while the
main thread stands in a collective, a CUDA synchronisation or a read that hangs: all of these release the
interpreter lock. For code that never does, there is the timer of ``stacks``: set at the first signal, it ends
the process from C. (A lock that was taken for good *before* the first signal leaves only what the launcher
does: torchrun and SLURM kill after 30 s. The stacks are printed all the same, by the timer of ``hangs``.)

Ending a process at once tears nothing: a step is committed by one rename, which happened or did not.
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
"""Added to the number of a signal that another rank got."""
_LAST_WORDS_S = 5.0
"""What ending takes at most, writing stacks and the reason included."""


class Shutdown:
    """Watches over the end of one process.

    Args:
        stop_signals: installed already; what has come before is seen too.
        timeout_s: from the first stop signal until the process is ended.
        stacks: where the stacks go.
    """

    def __init__(self, stop_signals: StopSignals, *, timeout_s: float, stacks: Stacks) -> None:
        self.on_exit: Callable[[str], None] = lambda _reason: None
        """Called with the reason before the process ends, on a thread, for a few seconds at most."""
        self._arrivals = stop_signals.arrivals
        self._stacks = stacks
        self._timeout_s = timeout_s
        self._patience = ShutdownTimer(timeout_s, signals.REPEAT_SIGNAL_AFTER_S)
        self._wake_fd, self._waker_fd = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._watch, name="shutdown", daemon=True)
        self._thread.start()

    def agreed(self, number: int) -> None:
        """All ranks stop because of this signal, which another rank may have got."""
        os.write(self._waker_fd, bytes([_AGREED + number]))

    def close(self) -> None:
        """The process has stopped in order. Main thread only."""
        os.close(self._waker_fd)
        self._thread.join()
        os.close(self._wake_fd)
        signal.set_wakeup_fd(-1)
        self._stacks.disarm()

    def _watch(self) -> None:
        armed = False
        while True:
            ends_at = self._patience.ends_at
            if ends_at is not None and not armed:
                armed = True
                self._stacks.end_process_in(self._timeout_s + _LAST_WORDS_S)
            left_s = None if ends_at is None else max(0.0, ends_at - time.monotonic())
            ready, _, _ = select.select([self._arrivals, self._wake_fd], [], [], left_s)
            if not ready:
                self._end(self._patience.timeout_reason)
            for source in ready:
                data = os.read(source if isinstance(source, int) else source.fileno(), 64)
                if not data:
                    return
                for number in data:
                    self._take(number)

    def _take(self, number: int) -> None:
        now = time.monotonic()
        if number >= _AGREED:
            self._patience.agreed(number - _AGREED, now)
        elif why := self._patience.arrived(number, now):
            self._end(why)

    def _end(self, why: str) -> None:
        self._stacks.end_process_in(_LAST_WORDS_S)
        self._stacks.to_stderr(f"{why}, so this process ends now")
        self._stacks.to_file(why)
        try:
            self.on_exit(why)
        finally:
            os._exit(EXIT_STOPPED)
