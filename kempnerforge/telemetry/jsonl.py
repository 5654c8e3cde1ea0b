"""``metrics.jsonl``: append-only, one JSON object a line, readable after a kill at any instant.

A row is ``{"step": 12, "attempt": 2, "time": 1764000000.25, "train/loss": 2.3412345678901234, ...}``.
Floats are written with ``repr``, so reading gives back the same bits. JSON has no words for what is not
finite: such floats are the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"`` (the spelling of protobuf's
JSON mapping, and of wandb), and ``read_rows`` turns them into floats again. So a step that was skipped for
its loss shows what the loss was; a missing key means that a value was not measured.

Rows are written on a thread (``write_behind``): training does not wait for a slow file system. On a fast one
a row is written when ``write`` returns. A whole line goes out in one ``write`` on an ``O_APPEND`` descriptor,
so a kill leaves at most one torn line, the last. The next writer ends that line before its own first row. No
prefix of a JSON object is a JSON object: a torn line cannot be taken for a row.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kempnerforge import fsio
from kempnerforge.telemetry.sinks import Row
from kempnerforge.write_behind import WriteBehind

CLOSE_WAIT_S = 5.0
"""The end of a run waits so long for rows that are not written yet."""

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class JsonlSink:
    """Appends rows to ``path``. A full disk costs rows and one warning, never the run.

    Args:
        path: the file; its folder must exist.
        attempt: which start of this run writes, counted from 1; stands in every row.
        warn: told once when rows begin to be lost, and once when writing works again.

    Raises:
        OSError: the file cannot be opened or repaired.
    """

    def __init__(self, path: Path, attempt: int, *, warn: Callable[[str], None]) -> None:
        self._path = path
        self._attempt = attempt
        self._warn = warn
        self._lost_rows = 0
        self._fd = fsio.open_file(path, os.O_RDWR | os.O_APPEND)
        self._torn = _ends_torn(self._fd)
        self._queue = WriteBehind("metrics", failed=lambda error: self._lose_row(str(error)))

    def write(self, row: Row) -> None:
        """Append one row, soon. Raises TypeError or ValueError for a value that JSON cannot hold."""
        line = _encode(row, self._attempt)
        if not self._queue.submit(lambda: self._append(line)):
            self._lose_row("too many rows wait for a slow file system")

    def flush(self, timeout_s: float) -> int:
        """Wait until all rows are written, for ``timeout_s`` at most. Returns how many are not."""
        return self._queue.flush(timeout_s)

    def _append(self, line: bytes) -> None:
        # A leading newline ends a line that was cut short, by a kill or by a full disk.
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
            self._warn(f"{self._path}: writing works again; {self._lost_rows} rows are missing")
            self._lost_rows = 0

    def close(self) -> None:
        """Write what waits, for ``CLOSE_WAIT_S`` at most, and close the file."""
        if left := self.flush(CLOSE_WAIT_S):
            self._warn(
                f"{self._path}: {left} rows are lost: not written within {CLOSE_WAIT_S:g} s of the end"
            )
        else:
            os.close(self._fd)

    def _lose_row(self, why: str) -> None:
        self._lost_rows += 1
        if self._lost_rows == 1:
            self._warn(f"{self._path}: cannot write metrics ({why}); rows are lost until it works again")


class RowsRead(NamedTuple):
    """What ``read_rows`` found."""

    rows: list[dict[str, Any]]
    """In the order of the file."""
    torn: int
    """Lines that are not a row: at most one for each time that a writer was killed, and foreign ones."""

    def next_step(self, first_attempt: int = 0) -> int:
        """One above the newest step that ``first_attempt`` or a later one has logged; 0 without rows."""
        return max((row["step"] + 1 for row in self.rows if row["attempt"] >= first_attempt), default=0)


def read_rows(path: Path, *, having: str = "") -> RowsRead:
    """Read all rows of a ``metrics.jsonl``, skipping and counting torn lines.

    ``having``: read only rows with this metric, which is much faster where few have it.

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
        except (ValueError, RecursionError):  # UnicodeDecodeError is one too
            row = None
        if isinstance(row, dict) and all(type(row.get(key)) is int for key in ("step", "attempt")):
            rows.append({key: decode_value(value) for key, value in row.items()})
        else:
            torn += 1
    return RowsRead(rows, torn)


def effective_rows(rows: Sequence[Row], resumes: Mapping[int, int]) -> list[Row]:
    """The rows that count, in their order: what an uninterrupted run would have logged.

    A row (attempt, step) counts if no later attempt resumed below that step: what was trained after
    the checkpoint that a later attempt started from has been trained again, or was rolled back.

    Args:
        rows: rows with ``attempt`` and ``step``, such as ``read_rows(path).rows``.
        resumes: attempt -> the step it resumed from; 0 for a fresh start. An attempt that ended before it
            had chosen a step is not in it.
    """
    last = {attempt: last_step_that_counts(attempt, resumes) for attempt in {row["attempt"] for row in rows}}
    return [row for row in rows if row["step"] <= last[row["attempt"]]]


def last_step_that_counts(attempt: int, resumes: Mapping[int, int]) -> float:
    """Up to which step the rows of ``attempt`` count; infinite where no later attempt resumed."""
    return min((step for later, step in resumes.items() if later > attempt), default=math.inf)


def by_step(rows: Iterable[Row]) -> dict[int, dict[str, Any]]:
    """One row a step, in order of steps: wandb cannot come back to a step. Of two values the later counts."""
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
    """``value`` as JSON can hold it: floats that are not finite become their names."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def decode_value(value: Any) -> Any:
    """A value of a row, with what ``encode_value`` did undone."""
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def _ends_torn(fd: int) -> bool:
    size_bytes = os.fstat(fd).st_size
    return size_bytes > 0 and os.pread(fd, 1, size_bytes - 1) != b"\n"
