"""Where ranks post what came of their part of a save: the c10d store, so that no background thread ever
enters a collective.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any, Protocol

from torch.distributed.distributed_c10d import PrefixStore, Store

_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.002, 0.1


class StoreChannel(Protocol):
    """A place for small messages that all ranks of a save see."""

    def post(self, key: str, message: dict[str, Any]) -> None:
        """Put a message under a key, once."""
        ...

    def read(self, key: str) -> dict[str, Any] | None:
        """The message under a key; None while there is none. Never blocks."""
        ...

    def read_all(self, keys: Sequence[str]) -> list[dict[str, Any]] | None:
        """The messages under all keys; None while one is missing. Never blocks."""
        ...

    def forget(self, key: str) -> None:
        """Remove a message that nobody will read again."""
        ...


class LocalBoard:
    """For one process alone."""

    def __init__(self) -> None:
        self._messages: dict[str, dict[str, Any]] = {}

    def post(self, key: str, message: dict[str, Any]) -> None:
        """Put a message under a key."""
        self._messages[key] = message

    def read(self, key: str) -> dict[str, Any] | None:
        """The message under a key."""
        return self._messages.get(key)

    def read_all(self, keys: Sequence[str]) -> list[dict[str, Any]] | None:
        """The messages under all keys."""
        return [self._messages[key] for key in keys] if self._messages.keys() >= set(keys) else None

    def forget(self, key: str) -> None:
        """Remove a message."""
        self._messages.pop(key, None)


class StoreBoard:
    """Over a c10d store, under a prefix of its own.

    Never calls ``wait`` on the store: a client that waits holds its lock and would block the training, which
    uses the same client.
    """

    def __init__(self, store: Store, prefix: str) -> None:
        self._store = PrefixStore(f"kempnerforge/{prefix}", store)

    def post(self, key: str, message: dict[str, Any]) -> None:
        """Put a message under a key."""
        self._store.set(key, json.dumps(message))

    def read(self, key: str) -> dict[str, Any] | None:
        """The message under a key."""
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def read_all(self, keys: Sequence[str]) -> list[dict[str, Any]] | None:
        """The messages under all keys: two round trips, however many there are."""
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
    """Read ``keys`` until all are there or time is up; None for those still missing.

    A message under ``stop_key`` ends the wait too.
    """
    deadline, pause_s = time.monotonic() + timeout_s, _FIRST_PAUSE_S
    while (messages := board.read_all(keys)) is None:
        stopped = stop_key is not None and board.read(stop_key) is not None
        if stopped or time.monotonic() > deadline:
            return {key: board.read(key) for key in keys}
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LAST_PAUSE_S)
    return dict(zip(keys, messages, strict=True))
