"""Read the documents or the records of a unit, streamed."""

from __future__ import annotations

from collections.abc import Iterator

from kempnerforge.data.reading.items import Piece, Record, Unreadable
from kempnerforge.data.reading.options import ReadOptions
from kempnerforge.data.reading.units import Unit


def read_pieces(unit: Unit, options: ReadOptions) -> Iterator[Piece | Unreadable]:
    """Yield the documents that begin in ``unit``, in order. Empty documents are left out.

    Raises :class:`DataError` instead of yielding ``Unreadable`` unless ``options.skip_unreadable``.
    """
    raise NotImplementedError


def read_records(unit: Unit, options: ReadOptions) -> Iterator[Record | Unreadable]:
    """Yield the JSON lines or rows of ``unit``, in order."""
    raise NotImplementedError
