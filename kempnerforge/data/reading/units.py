"""Parts of a file that one process reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kempnerforge.data.reading.files import TextFile
from kempnerforge.data.reading.options import ReadOptions
from kempnerforge.data.reading.streams import UTF16_MARKS, open_file, storage_errors
from kempnerforge.data.reading.table_files import FIRST_PART, DamagedTableError, TablePart, table_parts

UNIT_BYTES = 4 << 20
"""Size of a part of a file. Fixed, so that the units of a file are the same on every machine."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of a file, or the whole file."""

    file: TextFile
    number: int
    """Position in the file, from 0."""
    start: int
    """First byte of text, row group of Parquet, or record batch of Arrow."""
    end: int | None
    """End of the part. None: the end of the file."""
    size_bytes: int
    """Approximate share of ``file.size_bytes``; the units of a file add up to it."""
    first_part: TablePart = FIRST_PART
    """The row group or record batch ``start``."""


def units_of(file: TextFile, options: ReadOptions) -> list[Unit]:
    """Return the units of ``file``, in order. Each document is in exactly one of them, that of its beginning.

    Uncompressed text that consists of lines or separated documents is divided by bytes, tables by row
    groups or record batches. Everything else is one unit. A file that is damaged is one unit too, and
    reading it reports the damage.
    """
    if file.format in ("parquet", "arrow"):
        try:
            with storage_errors(file.path):
                return _join(file, table_parts(file.path, file.format))
        except DamagedTableError:
            return [Unit(file, 0, 0, None, file.size_bytes)]
    is_divisible = file.format == "jsonl" or options.document_separator is not None
    if not is_divisible or file.compression or file.size_bytes <= UNIT_BYTES or _is_utf16(file):
        return [Unit(file, 0, 0, None, file.size_bytes)]
    return _units(file, [*range(0, file.size_bytes, UNIT_BYTES)], file.size_bytes)


def _join(file: TextFile, parts: Sequence[TablePart]) -> list[Unit]:
    """Return units of neighbouring parts with at least ``UNIT_BYTES`` each, but for the last."""
    starts = [0]
    size_bytes = 0
    for number, part in enumerate(parts):
        if size_bytes >= UNIT_BYTES:
            starts.append(number)
            size_bytes = 0
        size_bytes += part.size_bytes
    units = _units(file, starts, len(parts))
    return [replace(unit, first_part=parts[unit.start]) for unit in units] if parts else units


def _units(file: TextFile, starts: Sequence[int], end: int) -> list[Unit]:
    ends = [*starts[1:], end]
    shares = [file.size_bytes * position // max(1, end) for position in (0, *ends[:-1])] + [file.size_bytes]
    return [
        Unit(file, n, start, ends[n] if n + 1 < len(starts) else None, shares[n + 1] - shares[n])
        for n, start in enumerate(starts)
    ]


def _is_utf16(file: TextFile) -> bool:
    with storage_errors(file.path), open_file(file.path) as content:
        return content.read(2) in UTF16_MARKS
