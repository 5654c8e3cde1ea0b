"""Read the documents or the records of Parquet and Arrow files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kempnerforge.data.reading.items import (
    MAX_DOCUMENT_BYTES,
    MAX_RECORD_BYTES,
    Piece,
    Record,
    Unreadable,
)
from kempnerforge.data.reading.options import ReadOptions
from kempnerforge.data.reading.pieces import cut_document, first_invalid_byte
from kempnerforge.data.reading.table_files import DamagedTableError, read_batches
from kempnerforge.data.reading.units import Unit


def read_table_texts(unit: Unit, options: ReadOptions) -> Iterator[Piece | Unreadable]:
    """Yield the text of each row of ``unit``."""
    file = unit.file
    field = options.text_field
    next_row: int | None = None
    try:
        for first_row, batch in read_batches(file.path, file.format, unit.start, unit.end, [field]):
            next_row = first_row
            for cell in _text_column(batch.column(0), field):
                content = _bytes_of(cell, field)
                if isinstance(content, str):
                    yield Unreadable(file.path, next_row, content)
                else:
                    yield from cut_document(content)
                next_row += 1
    except DamagedTableError as error:
        yield Unreadable(file.path, next_row, str(error))


def read_table_records(unit: Unit) -> Iterator[Record | Unreadable]:
    """Yield each row of ``unit``, with the values that pyarrow makes of its columns."""
    file = unit.file
    next_row: int | None = None
    try:
        for next_row, batch in read_batches(file.path, file.format, unit.start, unit.end, None):
            for index in range(batch.num_rows):
                row = batch.slice(index, 1)
                if reason := _row_fault(row):
                    yield Unreadable(file.path, next_row, reason)
                else:
                    yield Record(row.to_pylist()[0], f"{file.path}:{next_row}")
                next_row += 1
    except DamagedTableError as error:
        yield Unreadable(file.path, next_row, str(error))


def _text_column(column: Any, field: str) -> Any:
    """Return ``column`` without extension type, checked so that its cells can be read."""
    import pyarrow
    from pyarrow import types

    if isinstance(column, pyarrow.ExtensionArray):
        column = column.storage
    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    is_text = (types.is_string, types.is_large_string, types.is_string_view)
    is_binary = (types.is_binary, types.is_large_binary, types.is_binary_view)
    if not any(check(kind) for check in (*is_text, *is_binary)):
        raise DamagedTableError(f'its column "{field}" has type {column.type}, not text')
    try:
        column.validate(full=True)
    except pyarrow.ArrowInvalid as error:
        # A cell that is not UTF-8 is reported with its row.
        if "UTF8" not in str(error):
            raise DamagedTableError(f"it is damaged ({error})") from error
    return column


def _bytes_of(cell: Any, field: str) -> bytes | str:
    """Return the text of a cell, or why it cannot be read."""
    if not cell.is_valid:
        return f'"{field}" is null, not text'
    buffer = (cell.value if hasattr(cell, "dictionary") else cell).as_buffer()
    if buffer.size > MAX_DOCUMENT_BYTES:
        return _too_long("the text", buffer.size, MAX_DOCUMENT_BYTES)
    content = buffer.to_pybytes()
    invalid = first_invalid_byte(content)
    if invalid is not None:
        return f"byte {invalid} of the text (0x{content[invalid]:02x}) is not UTF-8"
    return content


def _row_fault(row: Any) -> str | None:
    import pyarrow

    if row.nbytes > MAX_RECORD_BYTES:
        return _too_long("the row", row.nbytes, MAX_RECORD_BYTES)
    try:
        row.validate(full=True)
    except pyarrow.ArrowInvalid as error:
        return f"it is damaged ({error})"
    return None


def _too_long(what: str, size_bytes: int, max_bytes: int) -> str:
    return f"{what} has {size_bytes:,} bytes; at most {max_bytes >> 20} MiB are read"
