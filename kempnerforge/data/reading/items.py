"""What the readers of all formats yield."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kempnerforge.data.reading.locations import Location

MAX_DOCUMENT_BYTES = 64 << 20
"""Longest JSON line, and longest text in a table."""

MAX_RECORD_BYTES = 8 << 20
"""Longest record as a whole, whose values can take several times its size in memory."""

MAX_FIELDS_NAMED = 8


@dataclass(frozen=True)
class Piece:
    """A document, or a part of one that is longer than ``PIECE_BYTES``."""

    content: bytes
    """Valid UTF-8, at least one byte."""
    ends_document: bool
    """The document has no more pieces."""


@dataclass(frozen=True)
class Record:
    """A JSON line, or a row of a table."""

    value: dict[str, Any]
    location: Location
    size_bytes: int = field(default=0, compare=False)
    """Size of the line, or of the row in memory."""


@dataclass(frozen=True)
class Unreadable:
    """A document, a record, or the rest of a file that cannot be read.

    Pieces that came after the last one with ``ends_document`` belong to the unreadable document:
    leave them out too.
    """

    location: Location
    reason: str

    def __str__(self) -> str:
        return f"{self.location}: {self.reason}"


def missing_field(field: str, kind: str, names: Sequence[str]) -> str:
    """Return the reason for a record or table without ``field``."""
    named = ", ".join(f'"{name}"' for name in names[:MAX_FIELDS_NAMED]) or "none"
    more = ", ..." if len(names) > MAX_FIELDS_NAMED else ""
    return f'it has no {kind} "{field}" (there are: {named}{more}); set data.text_field (--text-field)'
