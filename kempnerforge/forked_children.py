"""Signals of the children that code of the user's forks from a rank, or from a worker of its dataset.

A child has the handlers of its parent, so ``terminate`` of multiprocessing would not end it. It also has the
parent's wake-up socket, through which the parent would take the child's SIGTERM for its own.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Collection
from functools import partial

_saved = threading.local()
"""The masks of the thread that forks, one for each call of ``leave_signals_to_parent``."""


def leave_signals_to_parent(numbers: Collection[int]) -> None:
    """Have children that are forked from now on ignore the signals ``numbers``, but be ended by SIGTERM.

    The others may be sent to all processes, and the parent needs its children until it stops.
    """
    os.register_at_fork(
        before=partial(_block, numbers), after_in_parent=_unblock, after_in_child=partial(_reset, numbers)
    )


def _block(numbers: Collection[int]) -> None:
    """Let no signal reach the child before it has handlers of its own."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    _saved.masks = [*getattr(_saved, "masks", []), mask]


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _saved.masks.pop())


def _reset(numbers: Collection[int]) -> None:
    signal.set_wakeup_fd(-1)
    for number in numbers:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    _unblock()
