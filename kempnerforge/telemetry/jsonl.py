"""``metrics.jsonl``: append-only, one JSON object per line, readable after a kill at any instant.

A row is ``{"step": 12, "attempt": 2, "time": 1764000000.25, "train/loss": 2.341234567890, ...}``.
Floats are written with ``repr``, so that reading returns the same bits. JSON cannot represent
non-finite floats. They are written as the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"`` (as
in protobuf's JSON mapping and in wandb), and ``read_rows`` converts them back to floats. A step
that was skipped because of its loss therefore shows that loss. A missing key means that a value was
not measured.

Rows are written on a thread (``write_behind``), so that training does not wait for a slow file
system. On a fast one, a row is written when ``write`` returns. Each line is a single ``write`` to
an ``O_APPEND`` descriptor, so that a kill leaves at most one torn line, the last one. The next
writer ends that line before its first row. A torn line cannot be mistaken for a row, because no
prefix of a JSON object is a JSON object.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kempnerforge import fsio
from kempnerforge.telemetry.sinks import Row
from kempnerforge.write_behind import WriteBehind

log = logging.getLogger(__name__)

CLOSE_WAIT_S = 5.0
"""How long the end of a run waits for rows that are not written yet."""

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class JsonlSink:
    """Appends rows to ``path``. A full disk loses rows and is logged once, but does not stop the run.

    Args:
        path: the file. Its folder must exist.
        attempt: number of this start of the run, from 1. Written to every row.

    Raises:
        OSError: the file cannot be opened or repaired.
    """

    def __init__(self, path: Path, attempt: int) -> None:
        self._path = path
        self._attempt = attempt
        self._lost_rows = 0
        self._fd = fsio.open_file(path, os.O_RDWR | os.O_APPEND)
        self._torn = _ends_torn(self._fd)
        self._queue = WriteBehind("metrics", failed=lambda error: self._lose_row(str(error)))

    def write(self, row: Row) -> None:
        """Queue one row. Raises TypeError or ValueError for a value that JSON cannot represent."""
        line = _encode(row, self._attempt)
        if not self._queue.submit(lambda: self._append(line)):
            self._lose_row("too many rows are waiting for a slow file system")

    def flush(self, timeout_s: float) -> int:
        """Wait until all rows are written, for ``timeout_s`` at most. Return the number of unwritten rows."""
        return self._queue.flush(timeout_s)

    def _append(self, line: bytes) -> None:
        # A leading newline ends a line that a kill or a full disk has torn.
        data = b"\n" + line if self._torn else line
        try:
            written = os.write(self._fd, data)
        except OSError as error:
            self._lose_row(str(error))
            return
        self._torn = data[written - 1 : written] != b"\n"
        if written < len(data):
            self._lose_row(f"only {written} of {len(data)} bytes were written")
        elif self._lost_rows:
            log.warning(f"{self._path}: writing works again; {self._lost_rows} rows are missing")
            self._lost_rows = 0

    def close(self) -> None:
        """Write the queued rows, for ``CLOSE_WAIT_S`` at most, and close the file."""
        if left := self.flush(CLOSE_WAIT_S):
            log.warning(
                f"{self._path}: {left} rows are lost: not written within {CLOSE_WAIT_S:g} s of the end"
            )
        else:
            os.close(self._fd)

    def _lose_row(self, why: str) -> None:
        self._lost_rows += 1
        if self._lost_rows == 1:
            log.warning(f"{self._path}: cannot write metrics ({why}); rows are lost until it works again")


class RowsRead(NamedTuple):
    """The result of ``read_rows``."""

    rows: list[dict[str, Any]]
    """Rows in the order of the file."""
    torn: int
    """Number of lines that are not rows: at most one per killed writer, and lines that others wrote."""

    def next_step(self, first_attempt: int = 0) -> int:
        """Return 1 + the newest step logged by ``first_attempt`` or a later attempt; 0 without rows."""
        return max((row["step"] + 1 for row in self.rows if row["attempt"] >= first_attempt), default=0)


def read_rows(path: Path, *, having: str = "") -> RowsRead:
    """Read all rows of a ``metrics.jsonl``. Skip and count torn lines.

    With ``having``, read only rows with this metric. That is much faster if few rows have it.

    Raises:
        OSError: the file cannot be read.
    """
    rows: list[dict[str, Any]] = []
    torn = 0
    wanted = f'"{having}"'.encode() if having else b""
    for line in fsio.read_file(path).split(b"\n"):
        if not line or wanted not in line:
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
            row = None
        if isinstance(row, dict) and all(type(row.get(key)) is int for key in ("step", "attempt")):
            rows.append({key: decode_value(value) for key, value in row.items()})
        else:
            torn += 1
    return RowsRead(rows, torn)


def effective_rows(rows: Sequence[Row], resumes: Mapping[int, int]) -> list[Row]:
    """Return the rows of the final timeline, in order: those that an uninterrupted run would have logged.

    A row (attempt, step) is dropped if a later attempt resumed below that step, because the step
    was then repeated or rolled back.

    Args:
        rows: rows with ``attempt`` and ``step``, such as ``read_rows(path).rows``.
        resumes: attempt -> the step it resumed from; 0 for a fresh start. Attempts that ended
            before they selected a step are missing.
    """
    last = {attempt: last_step_that_counts(attempt, resumes) for attempt in {row["attempt"] for row in rows}}
    return [row for row in rows if row["step"] <= last[row["attempt"]]]


def last_step_that_counts(attempt: int, resumes: Mapping[int, int]) -> float:
    """Return the last step of ``attempt`` on the final timeline; infinite if no later attempt resumed."""
    return min((step for later, step in resumes.items() if later > attempt), default=math.inf)


def by_step(rows: Iterable[Row]) -> dict[int, dict[str, Any]]:
    """Merge rows into one per step, ordered by step, as wandb requires. Later values win."""
    merged: dict[int, dict[str, Any]] = {}
    for row in rows:
        merged.setdefault(row["step"], {}).update(row)
    return dict(sorted(merged.items()))


def _encode(row: Row, attempt: int) -> bytes:
    first = {"step": row["step"], "attempt": attempt, "time": row.get("time", time.time())}
    rest = {key: encode_value(value) for key, value in row.items() if key not in first}
    text = json.dumps({**first, **rest}, allow_nan=False, ensure_ascii=False, separators=(", ", ": "))
    return text.encode() + b"\n"


def encode_value(value: Any) -> Any:
    """Return ``value`` in a form that JSON can represent: non-finite floats become their names."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def decode_value(value: Any) -> Any:
    """Reverse ``encode_value``."""
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def _ends_torn(fd: int) -> bool:
    size_bytes = os.fstat(fd).st_size
    return size_bytes > 0 and os.pread(fd, 1, size_bytes - 1) != b"\n"
