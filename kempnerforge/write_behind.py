"""Run small file operations, such as appending a log row, without blocking the caller on slow storage."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

PROMPT_S = 0.02
"""How long a caller waits for its work. On a fast disk the work is done on return, so that a kill
loses at most the write in progress."""
IDLE_S = 5.0
"""The thread ends after this time without work."""
MOST = 10_000
"""Maximum number of queued pieces of work."""


class WriteBehind:
    """Runs pieces of work one after the other, in order, on a daemon thread.

    A caller does not wait at all while earlier work is queued. Work that is still queued when the
    process ends is lost. Call ``flush`` before the end.

    Args:
        failed: called on the thread with an exception that a piece of work raised.
    """

    def __init__(self, name: str, *, failed: Callable[[Exception], None]) -> None:
        self._name = name
        self._failed = failed
        self._changed = threading.Condition()
        self._queue: deque[Callable[[], None]] = deque()
        self._submitted = self._done = 0
        self._is_running = False

    def submit(self, work: Callable[[], None]) -> bool:
        """Queue ``work``. Block for ``PROMPT_S`` at most. Return False if the queue is full."""
        with self._changed:
            if len(self._queue) >= MOST:
                return False
            is_behind = self._done < self._submitted
            self._queue.append(work)
            self._submitted += 1
            mine = self._submitted
            if self._has_thread():
                self._changed.notify_all()
                if not is_behind:
                    self._changed.wait_for(lambda: self._done >= mine, PROMPT_S)
                return True
        self._work(stay=False)
        return True

    def flush(self, timeout_s: float | None) -> int:
        """Wait for all work, at most ``timeout_s`` (None: no limit). Return how much is unfinished."""
        with self._changed:
            self._changed.wait_for(lambda: self._done == self._submitted, timeout_s)
            return self._submitted - self._done

    def _has_thread(self) -> bool:
        if not self._is_running:
            try:
                threading.Thread(target=self._work, name=self._name, daemon=True).start()
            except RuntimeError:  # no more threads, or the interpreter is about to exit
                return False
            self._is_running = True
        return True

    def _work(self, *, stay: bool = True) -> None:
        while True:
            with self._changed:
                if stay and not self._queue:
                    self._changed.wait_for(lambda: bool(self._queue), IDLE_S)
                if not self._queue:
                    self._is_running = False if stay else self._is_running
                    return
                work = self._queue.popleft()
            try:
                work()
            except Exception as error:  # noqa: BLE001 - passed to the owner of the work
                self._failed(error)
            with self._changed:
                self._done += 1
                self._changed.notify_all()
