"""The protocol of sinks for metric rows, and the set of sinks that the loop writes to."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

Row = Mapping[str, Any]
"""``step`` (int) and metrics by name. ``SinkSet`` adds ``time`` (Unix time in seconds) if it is missing."""


class Sink(Protocol):
    """A destination of rows."""

    def write(self, row: Row) -> None:
        """Write one row. Must not change it or wait for a network."""
        ...

    def close(self) -> None:
        """Flush pending rows. No row may be written afterwards."""
        ...


class SinkSet:
    """Writes every row to all sinks. Ranks other than 0 have no sinks, so the loop needs no rank test."""

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self._sinks = tuple(sinks)

    def write(self, row: Row) -> None:
        """Write ``row`` to all sinks, with the same ``time`` for all."""
        stamped = row if "time" in row else {**row, "time": time.time()}
        for sink in self._sinks:
            sink.write(stamped)

    def close(self) -> None:
        """Close all sinks, the last one first, even if one of them raises an error."""
        with ExitStack() as stack:
            for sink in self._sinks:
                stack.callback(sink.close)
