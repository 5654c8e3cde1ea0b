"""Signals that ask the run to stop, or to save now. A handler sets a flag and nothing else.

Signals arrive back to back and in the middle of anything, so a handler that logs, saves or talks to other
ranks can crash or deadlock; what to do is decided by all ranks together at the next step.
"""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class StopSignals:
    """Remembers the first stop signal that this process got."""

    def __init__(self) -> None:
        self.received = 0
        """Number of the signal; 0 while there is none."""
        self.save_requested = False
        """Whether SIGUSR2 has asked for a save; whoever answers it sets it back."""

    def install(self) -> None:
        """Take over the stop signals. Main thread only."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)
        signal.signal(signal.SIGUSR2, self._request_save)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.received = self.received or number

    def _request_save(self, _number: int, _frame: FrameType | None) -> None:
        self.save_requested = True
