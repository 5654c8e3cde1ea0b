"""Read the last rows of ``metrics.jsonl`` and of the ledger without the rest of a large file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kempnerforge import fsio
from kempnerforge.checkpoint.run.lineage import ResumePoint

FIRST_BYTES = 1 << 16
MOST_BYTES = 1 << 22
"""How much of the end of a file is read at most: about 10,000 rows."""


def last_rows(path: Path, keys: Sequence[str], cuts: Sequence[ResumePoint]) -> dict[str, dict[str, Any]]:
    """Return each key that a row near the end has -> the last row with it that counts. Raises OSError.

    A row counts unless one of ``cuts`` leaves its step behind.
    """
    missing = {key: f'"{key}"'.encode() for key in keys}
    found: dict[str, dict[str, Any]] = {}
    for line in lines_from_end(path):
        if not any(name in line for name in missing.values()):
            continue
        row = parse(line)
        if row is None or not all(type(row.get(name)) is int for name in ("step", "attempt")):
            continue
        if any(cut.leaves_behind(row["step"], row["attempt"]) for cut in cuts):
            continue
        for key in [key for key in missing if key in row]:
            found[key] = row
            del missing[key]
        if not missing:
            break
    return found


def lines_from_end(path: Path) -> Iterator[bytes]:
    """Yield the lines of the last ``MOST_BYTES`` of a file, the last one first; none without a file."""
    try:
        file = os.fdopen(fsio.open_to_read(path), "rb")
    except FileNotFoundError:
        return
    with file:
        end = file.seek(0, os.SEEK_END)
        oldest, size_bytes, rest = max(0, end - MOST_BYTES), FIRST_BYTES, b""
        while end > oldest:
            start = max(oldest, end - size_bytes)
            file.seek(start)
            lines = (file.read(end - start) + rest).split(b"\n")
            rest = lines.pop(0)  # may have begun earlier
            yield from reversed(lines)
            end, size_bytes = start, 4 * size_bytes
        yield rest


def parse(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object of a line; None if it is torn or something else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
