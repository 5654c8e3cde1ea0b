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
from kempnerforge.data.reading.locations import Location
from kempnerforge.data.reading.options import ReadOptions
from kempnerforge.data.reading.pieces import cut_document, first_invalid_byte
from kempnerforge.data.reading.table_files import DamagedTableError, WrongColumnError, read_batches
from kempnerforge.data.reading.units import Unit


def read_table_texts(unit: Unit, options: ReadOptions) -> Iterator[Piece | Unreadable]:
    """Yield the text of each row of ``unit``."""
    file = unit.file
    field = options.text_field
    next_row: int | None = None
    try:
        for next_row, batch in read_batches(
            file.path, file.format, unit.start, unit.end, unit.first_part, [field]
        ):
            for content in _cells(_text_column(batch.column(0), field), field):
                if isinstance(content, str):
                    yield Unreadable(Location(file.path, next_row), content)
                else:
                    yield from cut_document(content)
                next_row += 1
                del content
            del batch  # before the next one is made
    except WrongColumnError as error:
        if not unit.number:  # once for the file
            yield Unreadable(Location(file.path), str(error))
    except DamagedTableError as error:
        yield Unreadable(Location(file.path, next_row), str(error))


def read_table_records(unit: Unit) -> Iterator[Record | Unreadable]:
    """Yield each row of ``unit``, with the values that pyarrow makes of its columns.

    A time that Python cannot represent is the number that the table holds. A null inside an object is
    left out: all objects of a column have the same fields in a table, so those that one did not have are
    null there.
    """
    file = unit.file
    next_row: int | None = None
    try:
        for next_row, batch in read_batches(
            file.path, file.format, unit.start, unit.end, unit.first_part, None
        ):
            for index in range(batch.num_rows):
                row = batch.slice(index, 1)
                if reason := _row_fault(row):
                    yield Unreadable(Location(file.path, next_row), reason)
                else:
                    yield _record(row, Location(file.path, next_row))
                next_row += 1
    except DamagedTableError as error:
        yield Unreadable(Location(file.path, next_row), str(error))


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
        raise WrongColumnError(f'its column "{field}" has type {column.type}, not text')
    try:
        column.validate(full=True)
    except pyarrow.ArrowException as error:
        # A cell that is not UTF-8 is reported with its row.
        if "UTF8" not in str(error):
            raise DamagedTableError(f"it is damaged ({error})") from error
    return column


def _cells(column: Any, field: str) -> Iterator[memoryview | str]:
    """Yield the text of each cell, or why it cannot be read."""
    for cell in _plain_cells(column):
        if cell is None:
            yield f'"{field}" is null, not text'
        elif len(cell) > MAX_DOCUMENT_BYTES:
            yield _too_long("the text", len(cell), MAX_DOCUMENT_BYTES)
        elif (invalid := first_invalid_byte(cell)) is not None:
            yield f"byte {invalid} of the text (0x{cell[invalid]:02x}) is not UTF-8"
        else:
            yield cell


def _plain_cells(column: Any) -> Iterator[memoryview | None]:
    """Yield the bytes of each cell. Arrow copies each cell that it returns, which this avoids."""
    from pyarrow import types

    kind = column.type
    if types.is_dictionary(kind):
        values = column.dictionary
        for index in column.indices:
            yield _scalar_bytes(values[index.as_py()]) if index.is_valid else None
        return
    is_long = types.is_large_string(kind) or types.is_large_binary(kind)
    if not (is_long or types.is_string(kind) or types.is_binary(kind)):
        yield from map(_scalar_bytes, column)
        return
    valid = column.is_valid() if column.null_count else None
    _, offsets, data = column.buffers()
    positions = memoryview(offsets).cast("B").cast("q" if is_long else "i")
    content = memoryview(data or b"").cast("B")
    for index in range(len(column)):
        start, end = positions[column.offset + index], positions[column.offset + index + 1]
        yield content[start:end] if valid is None or valid[index].as_py() else None


def _scalar_bytes(cell: Any) -> memoryview | None:
    return memoryview(cell.as_buffer()).cast("B") if cell.is_valid else None


def _record(row: Any, location: Location) -> Record | Unreadable:
    from pyarrow import types

    value: dict[str, Any] = {}
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            value[name] = _without_null_fields(column[0].as_py())
        # A time out of range, in nanoseconds, or in an unknown zone. pyarrow's own error is a ValueError.
        except (ValueError, OverflowError) as error:
            if not types.is_temporal(column.type):
                return Unreadable(location, f'"{name}" holds a value that Python cannot represent ({error})')
            value[name] = column[0].value
    return Record(value, location, row.nbytes)


def _without_null_fields(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_null_fields(each) for name, each in value.items() if each is not None}
    return [_without_null_fields(each) for each in value] if isinstance(value, list) else value


def _row_fault(row: Any) -> str | None:
    import pyarrow

    if row.nbytes > MAX_RECORD_BYTES:
        return _too_long("the row", row.nbytes, MAX_RECORD_BYTES)
    try:
        row.validate(full=True)
    except pyarrow.ArrowException as error:
        return f"it is damaged ({error})"
    return None


def _too_long(what: str, size_bytes: int, max_bytes: int) -> str:
    return f"{what} has {size_bytes:,} bytes; at most {max_bytes >> 20} MiB are read"
