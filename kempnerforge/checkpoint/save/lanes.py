"""At what priority the writer works: beside the training's steps only in time that nobody else wants."""

from __future__ import annotations

import os
from concurrent.futures import Executor, ThreadPoolExecutor

_AT_ONCE = 2
"""A block is digested while it is being written."""


class WriterThreads:
    """Threads that work when they can, and threads that work only when a core would else be idle.

    Ranks wait for each other in every step: what a writer takes from one of them all lose. A thread's policy
    cannot be raised again without privileges, so there are threads for either.
    """

    def __init__(self) -> None:
        self._prompt = ThreadPoolExecutor(_AT_ONCE)
        self._idle = ThreadPoolExecutor(_AT_ONCE, initializer=_yield_to_all)

    def pick(self, *, prompt: bool) -> Executor:
        """Where to work; ``prompt``: somebody waits for it."""
        return self._prompt if prompt else self._idle


def _yield_to_all() -> None:
    """The calling thread only: ``SCHED_IDLE``, or the lowest of the ordinary ones where it is forbidden."""
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except OSError:
        os.nice(19)
