"""Read the documents or the records of a unit, streamed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from kempnerforge.data.reading.items import Piece, Record, Unreadable
from kempnerforge.data.reading.json_lines import read_json_records, read_json_texts
from kempnerforge.data.reading.options import ReadOptions
from kempnerforge.data.reading.plain_text import read_text
from kempnerforge.data.reading.streams import storage_errors
from kempnerforge.data.reading.tables import read_table_records, read_table_texts
from kempnerforge.data.reading.units import Unit
from kempnerforge.errors import DataError

READERS = {
    "text": read_text,
    "jsonl": read_json_texts,
    "parquet": read_table_texts,
    "arrow": read_table_texts,
}

Item = TypeVar("Item", Piece, Record)


def read_pieces(unit: Unit, options: ReadOptions) -> Iterator[Piece | Unreadable]:
    """Yield the documents that begin in ``unit``, in order. Empty documents are left out.

    Peak memory does not grow with files, lines or documents, only with the pages of Parquet. Raises
    :class:`DataError` instead of yielding ``Unreadable`` unless ``options.skip_unreadable``, and for
    errors of storage.
    """
    return _checked(unit, options, READERS[unit.file.format](unit, options))


def read_records(unit: Unit, options: ReadOptions) -> Iterator[Record | Unreadable]:
    """Yield the JSON lines or rows of ``unit``, in order. Raises as ``read_pieces`` does."""
    if unit.file.format == "text":
        raise DataError(
            f"{unit.file.path}: it is text without fields; records are read from .jsonl, .parquet and .arrow"
        )
    read = read_json_records if unit.file.format == "jsonl" else read_table_records
    return _checked(unit, options, read(unit))


def _checked(
    unit: Unit, options: ReadOptions, items: Iterator[Item | Unreadable]
) -> Iterator[Item | Unreadable]:
    with storage_errors(unit.file.path):
        for item in items:
            if isinstance(item, Unreadable) and not options.skip_unreadable:
                raise DataError(
                    f"{item}; correct it, or leave it out: data.skip_unreadable = true (--skip-unreadable)"
                )
            yield item
