"""Let all other ranks wait for long work on one rank, for as long as the work makes progress.

A collective fails after the time-out of its group, which is chosen for ranks that wait for each
other within a step. The work of rank 0 alone may take longer: tokenising a corpus, watching another
host's lease, deleting a large folder. The other ranks therefore do not wait in a collective. They
poll one key of the c10d store, which rank 0 changes while it works, and give up when the key has
not changed for the time-out.

A thread of rank 0 sends the heartbeats. It sends one only when the working thread has used
processor time since the last one, so a rank that hangs in the file system, is stopped or is dead
sends none. The store is used because collectives of one group may not be issued from two threads.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from torch.distributed.distributed_c10d import Store

_KEY = "work"
_DONE = "done"
_BEATS_PER_TIMEOUT = 10
_LONGEST_BEAT_S = 10.0
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.001, 1.0
_PAUSE_SHARE = 0.05
"""The pause between two polls as a share of the time waited so far: thousands of ranks poll one store."""


class Heartbeat:
    """The heartbeats of one rank's work, in ``store``, which nothing else uses.

    Pieces of work are numbered. All ranks use the same numbers.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._number = 0

    @contextlib.contextmanager
    def working(self, timeout_s: float) -> Iterator[None]:
        """Send heartbeats while the block runs. Call it on the rank that works.

        The end of the block, also by an error, releases the waiting ranks. ``timeout_s`` is how
        long they wait for a heartbeat.
        """
        self._number += 1
        ended = threading.Event()
        clock = time.pthread_getcpuclockid(threading.get_ident())
        beat_s = min(timeout_s / _BEATS_PER_TIMEOUT, _LONGEST_BEAT_S)
        thread = threading.Thread(
            target=self._beat, args=(self._number, clock, beat_s, ended), name="heartbeat", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self._store.set(_KEY, f"{self._number} {_DONE}")

    def _beat(self, number: int, clock: int, beat_s: float, ended: threading.Event) -> None:
        used_s, beats = time.clock_gettime(clock), 0
        while not ended.wait(beat_s):
            now_s = time.clock_gettime(clock)
            if now_s == used_s:
                continue
            used_s, beats = now_s, beats + 1
            try:
                self._store.set(_KEY, f"{number} {beats}")
            except RuntimeError:  # the store is gone; ``working`` raises this error at its end
                return

    def wait(self, timeout_s: float) -> None:
        """Return when the work is done. Call it on a rank that waits.

        Blocks: for as long as the work makes progress. It polls, because a client that waits on the
        store holds the store's lock. Raises TimeoutError when there was no heartbeat for
        ``timeout_s``.
        """
        self._number += 1
        last, began = "", time.monotonic()
        changed = began
        while True:
            seen = self._store.get(_KEY).decode() if self._store.check([_KEY]) else ""
            now = time.monotonic()
            number, _, state = seen.partition(" ")
            if seen and (int(number) > self._number or (int(number) == self._number and state == _DONE)):
                return  # a later number means that the working rank is ahead already
            if seen != last:
                last, changed = seen, now
            elif now - changed > timeout_s:
                raise TimeoutError(
                    f"timed out waiting for rank 0: it has shown no progress for {timeout_s:g} s, "
                    "the time-out of the process group (distributed.timeout_s)"
                )
            pause_s = min(max(_FIRST_PAUSE_S, _PAUSE_SHARE * (now - began)), _LAST_PAUSE_S, timeout_s / 10)
            time.sleep(pause_s)
