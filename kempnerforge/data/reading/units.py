"""Parts of a file that one process reads."""

from __future__ import annotations

from dataclasses import dataclass

from kempnerforge.data.reading.files import TextFile
from kempnerforge.data.reading.options import ReadOptions

UNIT_BYTES = 32 << 20
"""Size of a part of a file. Fixed, so that the units of a file are the same on every machine."""


@dataclass(frozen=True)
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


def units_of(file: TextFile, options: ReadOptions) -> list[Unit]:
    """Return the units of ``file``, in order. Each document is in exactly one of them."""
    raise NotImplementedError
