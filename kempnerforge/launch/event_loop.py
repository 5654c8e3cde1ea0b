"""Wait for signals, ends of processes, messages and output, all in one thread."""

from __future__ import annotations

import selectors
import signal
import socket
from collections.abc import Callable

from kempnerforge.rank_variables import FORWARDED

_MAX_WAIT_S = 1.0


class EventLoop:
    """Calls back for everything that happens. SIGCHLD only wakes it up: ``tick`` polls the processes.

    SIGINT and SIGHUP remain ignored if they were ignored when the process started, as in the ranks.
    """

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        """What to wait for: a file, and as its data a function to call when it can be read."""
        self._arrivals, self._wakeup = socket.socketpair()
        self._arrivals.setblocking(False)
        self._wakeup.setblocking(False)
        self._on_signal: Callable[[int], None] = lambda _number: None
        self.selector.register(self._arrivals, selectors.EVENT_READ, self._read_signals)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        for number in FORWARDED:
            may_be_ignored = number in (signal.SIGHUP, signal.SIGINT)
            if not (may_be_ignored and signal.getsignal(number) is signal.SIG_IGN):
                signal.signal(number, lambda _number, _frame: None)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)

    def run(self, tick: Callable[[], int | None], on_signal: Callable[[int], None]) -> int:
        """Call ``tick`` after every event, and at least once a second, until it returns a status."""
        self._on_signal = on_signal
        while True:
            status = tick()
            if status is not None:
                return status
            for key, _ in self.selector.select(_MAX_WAIT_S):
                key.data()

    def _read_signals(self) -> None:
        for number in self._arrivals.recv(4096):
            if number in FORWARDED:
                self._on_signal(number)
