"""Where metric rows go: the protocol that every sink follows, and the fan-out that the loop writes to."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

Row = Mapping[str, Any]
"""``step`` (int) and metrics by name. ``SinkSet`` adds ``time`` (Unix time, seconds) where it is missing."""


class Sink(Protocol):
    """One place that rows go to."""

    def write(self, row: Row) -> None:
        """Take one row. Never changes it and never waits for a network."""
        ...

    def close(self) -> None:
        """Hand over what is still held back. No row may be written after it."""
        ...


class SinkSet:
    """Hands every row to every sink. Ranks other than 0 hold an empty set, so the loop needs no rank test."""

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self._sinks = tuple(sinks)

    def write(self, row: Row) -> None:
        """Hand ``row`` to all sinks, stamped with one ``time`` so that they agree on it."""
        stamped = row if "time" in row else {**row, "time": time.time()}
        for sink in self._sinks:
            sink.write(stamped)

    def close(self) -> None:
        """Close all sinks, the last one first; an error in one does not keep the others open."""
        with ExitStack() as stack:
            for sink in self._sinks:
                stack.callback(sink.close)
