"""Where a document or a record is in its file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kempnerforge.data.reading.streams import BLOCK_BYTES, open_file, storage_errors


@dataclass(frozen=True)
class Location:
    """A line of a text file, a row of a table, or a file as a whole.

    As text it is ``FILE:LINE`` or ``FILE``. The lines before ``first_byte`` are counted only for
    that, because it reads the file: the units of a file would read it again and again.
    """

    path: Path
    line: int | None = None
    """Line or row, from 1. None: the file as a whole."""
    first_byte: int = 0
    """Byte of the file in whose line ``line`` is 1."""

    def __str__(self) -> str:
        return location_texts([self])[self]


def location_texts(locations: Iterable[Location]) -> dict[Location, str]:
    """Return the text of each location. Reads each file once at most.

    Raises :class:`~kempnerforge.data.reading.streams.StorageError` if a file cannot be read.
    """
    by_path: dict[Path, list[Location]] = {}
    for location in locations:
        by_path.setdefault(location.path, []).append(location)
    texts: dict[Location, str] = {}
    for path, of_file in by_path.items():
        lines_before = _count_lines(path, sorted({location.first_byte for location in of_file}))
        for location in of_file:
            line = location.line
            text = str(path) if line is None else f"{path}:{lines_before[location.first_byte] + line}"
            texts[location] = text
    return texts


def _count_lines(path: Path, offsets: Sequence[int]) -> dict[int, int]:
    """Return the number of line ends before each of ``offsets``, which ascend."""
    if offsets[-1] == 0:
        return {0: 0}
    counts: dict[int, int] = {}
    position = lines = 0
    with storage_errors(path), open_file(path) as file:
        for offset in offsets:
            while position < offset and (block := file.read(min(BLOCK_BYTES, offset - position))):
                lines += block.count(b"\n")
                position += len(block)
            counts[offset] = lines
    return counts
