"""Messages between the ranks of a save, through the c10d store.

Ranks post the outcome of their part of a save here, so that no background thread ever enters a
collective.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any, Protocol

from torch.distributed.distributed_c10d import PrefixStore, Store

_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.002, 0.1


class StoreChannel(Protocol):
    """Small messages by key that all ranks of a save can read."""

    def post(self, key: str, message: dict[str, Any]) -> None:
        """Store a message under a key. Each key is used once."""
        ...

    def read(self, key: str) -> dict[str, Any] | None:
        """Return the message under a key, or None while there is none. Never blocks."""
        ...

    def read_all(self, keys: Sequence[str]) -> list[dict[str, Any]] | None:
        """Return the messages under all keys, or None while one is missing. Never blocks."""
        ...

    def forget(self, key: str) -> None:
        """Remove a message that no rank will read again."""
        ...


class LocalBoard:
    """A channel for a single process."""

    def __init__(self) -> None:
        self._messages: dict[str, dict[str, Any]] = {}

    def post(self, key: str, message: dict[str, Any]) -> None:
        """Store a message under a key."""
        self._messages[key] = message

    def read(self, key: str) -> dict[str, Any] | None:
        """Return the message under a key, or None."""
        return self._messages.get(key)

    def read_all(self, keys: Sequence[str]) -> list[dict[str, Any]] | None:
        """Return the messages under all keys, or None while one is missing."""
        return [self._messages[key] for key in keys] if self._messages.keys() >= set(keys) else None

    def forget(self, key: str) -> None:
        """Remove a message."""
        self._messages.pop(key, None)


class StoreBoard:
    """A channel over a c10d store, under a prefix that nothing else uses.

    It never calls ``wait`` on the store: a client that waits holds the store's lock and would block
    the training, which uses the same client.
    """

    def __init__(self, store: Store, prefix: str) -> None:
        self._store = PrefixStore(f"kempnerforge/{prefix}", store)

    def post(self, key: str, message: dict[str, Any]) -> None:
        """Store a message under a key."""
        self._store.set(key, json.dumps(message))

    def read(self, key: str) -> dict[str, Any] | None:
        """Return the message under a key, or None."""
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def read_all(self, keys: Sequence[str]) -> list[dict[str, Any]] | None:
        """Return the messages under all keys, or None while one is missing.

        Two round trips, however many keys there are.
        """
        keys = list(keys)
        if not self._store.check(keys):
            return None
        return [json.loads(raw) for raw in self._store.multi_get(keys)]

    def forget(self, key: str) -> None:
        """Remove a message."""
        self._store.delete_key(key)


def collect(
    board: StoreChannel, keys: list[str], *, timeout_s: float, stop_key: str | None = None
) -> dict[str, dict[str, Any] | None]:
    """Wait for the messages under ``keys`` until all have arrived or ``timeout_s`` has passed.

    A missing message is None in the result. A message under ``stop_key`` ends the wait, too.
    """
    deadline, pause_s = time.monotonic() + timeout_s, _FIRST_PAUSE_S
    while (messages := board.read_all(keys)) is None:
        stopped = stop_key is not None and board.read(stop_key) is not None
        if stopped or time.monotonic() > deadline:
            return {key: board.read(key) for key in keys}
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LAST_PAUSE_S)
    return dict(zip(keys, messages, strict=True))
