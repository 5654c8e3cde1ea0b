"""Destinations of metric rows: the base class of plug-ins, and the set of sinks that the loop writes to."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from kempnerforge.config.schema import JobConfig

Row = Mapping[str, Any]
"""``step`` (int) and metrics by name. ``SinkSet`` adds ``time`` (Unix time in seconds) if it is missing."""


@dataclass(frozen=True)
class RunInfo:
    """What plug-ins are told about the attempt that begins."""

    job: JobConfig
    """The resolved configuration."""
    run_dir: Path
    """The run's folder."""
    run_id: str
    attempt: int
    """Number of this start of the run, from 1."""
    step: int
    """The step that this attempt begins from: 0, or the one that was resumed."""
    rank: int
    num_ranks: int


class RowWriter(Protocol):
    """A destination of rows."""

    def write(self, row: Row) -> None:
        """Write one row. Must not change it or wait for a network."""
        ...

    def close(self) -> None:
        """Flush pending rows. No row may be written afterwards."""
        ...


class Sink:
    """The base class of sinks that a config names in ``[[metrics.sinks]]``. Rank 0 alone has them.

    A sink that raises an exception is named in a warning and is not called again. Training
    continues. The methods run in the training loop, which waits for them.
    """

    def start(self, info: RunInfo) -> None:
        """Begin an attempt: the state is loaded, and ``write`` follows.

        Rows of earlier attempts above ``info.step`` no longer count.
        """

    def write(self, row: Row) -> None:
        """Write one row of ``metrics.jsonl``, which is read-only. It must be overridden."""
        raise NotImplementedError(f"{type(self).__name__} has no method write")

    def close(self) -> None:
        """End the attempt: flush what is pending. No row follows."""


class SinkSet:
    """Writes every row to all sinks. Ranks other than 0 have no sinks, so the loop needs no rank test."""

    def __init__(self, sinks: Sequence[RowWriter] = ()) -> None:
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
