"""Open Parquet and Arrow files and read their rows in batches of bounded size."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from kempnerforge.data.reading.heads import ARROW_FILE_MARK
from kempnerforge.data.reading.items import missing_field
from kempnerforge.data.reading.streams import BLOCK_BYTES, open_file
from kempnerforge.errors import DataError

BATCH_BYTES = 4 << 20
"""Rows are read in batches of about this size."""

MAX_BATCH_ROWS = 1024

MAY_HAVE_DICTIONARY = ("dictionary<", "extension<")
"""In the names of Arrow's types, nested ones included."""


class DamagedTableError(Exception):
    """The rest of a table cannot be read."""


class WrongColumnError(DamagedTableError):
    """A table has no column of text with the name that was asked for."""


@dataclass(frozen=True)
class TablePart:
    """A row group of Parquet, or a record batch of Arrow."""

    size_bytes: int
    """Uncompressed."""
    rows_before: int
    """Rows of the parts before it."""
    first_byte: int = 0
    """Where it begins in an Arrow stream. 0 if the stream must be read from its beginning."""


FIRST_PART = TablePart(size_bytes=0, rows_before=0)
"""The beginning of a table of which no more is known."""


def table_parts(path: Path, format_: str) -> list[TablePart]:
    """Return all row groups (Parquet) or record batches (Arrow).

    An Arrow stream that is cut off has the batches before the cut. Raises ``DamagedTableError``, and
    :class:`DataError` if pyarrow is not installed.
    """
    with _arrow_errors(path):
        if format_ == "parquet":
            with _open_parquet(path) as table:
                groups = [table.metadata.row_group(n) for n in range(table.metadata.num_row_groups)]
                rows_before = accumulate((group.num_rows for group in groups), initial=0)
                return [TablePart(group.total_byte_size, next(rows_before)) for group in groups]
    parts: list[TablePart] = []
    rows = 0
    try:
        for first_byte, batch in _ArrowFile(path, None).batches(0, None, FIRST_PART):
            parts.append(TablePart(batch.nbytes, rows, first_byte))
            rows += batch.num_rows
    except DamagedTableError:
        if not parts:
            raise
    return parts


def read_batches(
    path: Path, format_: str, start: int, end: int | None, first: TablePart, columns: Sequence[str] | None
) -> Iterator[tuple[int, Any]]:
    """Yield the rows of the parts ``start`` to ``end``: the number of the first row, and a record batch.

    ``first`` is the part ``start``. ``columns`` None means all. A batch must not be used after the next
    one was asked for. Memory grows with the largest page of a Parquet file, which pyarrow decompresses
    as a whole, and with the largest compressed batch of an Arrow file.

    Raises ``DamagedTableError``, and :class:`DataError` if pyarrow is not installed.
    """
    read = _parquet_batches if format_ == "parquet" else _arrow_batches
    yield from read(path, start, end, first, columns)


def _parquet_batches(
    path: Path, start: int, end: int | None, first: TablePart, columns: Sequence[str] | None
) -> Iterator[tuple[int, Any]]:
    with _arrow_errors(path), _open_parquet(path) as table:
        metadata = table.metadata
        _require_columns(table.schema_arrow.names, columns)
        row = 1 + first.rows_before
        for number in range(start, metadata.num_row_groups if end is None else end):
            group = metadata.row_group(number)
            for batch in table.iter_batches(
                _rows_per_batch(group.num_rows, group.total_byte_size),
                row_groups=[number],
                columns=columns,
                use_threads=False,
            ):
                count = batch.num_rows
                yield row, batch
                row += count
                del batch  # before the next one is made


def _arrow_batches(
    path: Path, start: int, end: int | None, first: TablePart, columns: Sequence[str] | None
) -> Iterator[tuple[int, Any]]:
    table = _ArrowFile(path, columns)
    row = 1 + first.rows_before
    for _, batch in table.batches(start, end, first):
        count = _rows_per_batch(batch.num_rows, batch.nbytes)
        for offset in range(0, batch.num_rows, count):
            yield row + offset, batch.slice(offset, count)
            table.release_memory()
        row += batch.num_rows


class _ArrowFile:
    """A file of record batches, in the file format or the stream format, mapped into memory."""

    def __init__(self, path: Path, columns: Sequence[str] | None) -> None:
        self._path = path
        self._columns = columns
        self._ipc = _pyarrow().ipc
        with open_file(path) as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._is_stream = not self._map[: len(ARROW_FILE_MARK)].startswith(ARROW_FILE_MARK)
        self._options = None
        with _arrow_errors(path):
            names = self._open().schema.names
            _require_columns(names, columns)
            # For the file format, Arrow would copy the columns into memory.
            if columns is not None and self._is_stream:
                indices = [names.index(name) for name in columns]
                self._options = self._ipc.IpcReadOptions(included_fields=indices)

    def batches(self, start: int, end: int | None, first: TablePart) -> Iterator[tuple[int, Any]]:
        """Yield the record batches ``start`` to ``end``, whose buffers have the sizes that they need.

        ``first`` is the batch ``start``. Each batch comes with its ``TablePart.first_byte``.
        """
        with _arrow_errors(self._path):
            if self._is_stream:
                yield from self._stream_batches(start, end, first)
                return
            reader = self._open()
            for number in range(start, reader.num_record_batches if end is None else end):
                batch = reader.get_batch(number)
                batch.validate()
                yield 0, batch if self._columns is None else batch.select(self._columns)

    def _stream_batches(self, start: int, end: int | None, first: TablePart) -> Iterator[tuple[int, Any]]:
        source = _pyarrow().BufferReader(self._map)
        reader = self._ipc.open_stream(source, options=self._options)
        # Batches may need dictionaries from anywhere before them.
        can_seek = not any(word in str(kind) for kind in reader.schema.types for word in MAY_HAVE_DICTIONARY)
        number = 0
        if first.first_byte:
            # The reader has read the schema, and reads the next batch wherever its source is.
            source.seek(first.first_byte)
            number = start
        while end is None or number < end:
            first_byte = source.tell() if can_seek else 0
            try:
                batch = reader.read_next_batch()
            except StopIteration:
                return
            if number >= start:
                batch.validate()
                yield first_byte, batch
            number += 1

    def release_memory(self) -> None:
        """Give back the memory of the pages that were read. They are read again if they are used again."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def _open(self) -> Any:
        content = _pyarrow().py_buffer(self._map)
        if self._is_stream:
            return self._ipc.open_stream(content, options=self._options)
        return self._ipc.open_file(content, options=self._options)


def _open_parquet(path: Path) -> Any:
    _pyarrow()
    import pyarrow.parquet

    # With a buffer, column chunks are read page by page instead of whole.
    return pyarrow.parquet.ParquetFile(path, buffer_size=BLOCK_BYTES, pre_buffer=False)


def _pyarrow() -> Any:
    try:
        import pyarrow.ipc
    except ModuleNotFoundError as error:
        raise DataError(
            'Parquet and Arrow files need the package pyarrow: pip install "kempnerforge[data]"'
        ) from error
    return pyarrow


@contextmanager
def _arrow_errors(path: Path) -> Iterator[None]:
    arrow_error = _pyarrow().ArrowException
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            raise
        raise DamagedTableError(_damage(error)) from error
    # Names that are not UTF-8 are a UnicodeDecodeError.
    except (arrow_error, UnicodeDecodeError) as error:
        raise DamagedTableError(_damage(error)) from error


def _damage(error: Exception) -> str:
    return f"it is damaged or cut off ({str(error).splitlines()[0]})"


def _require_columns(names: Sequence[str], columns: Sequence[str] | None) -> None:
    for column in columns or ():
        if column not in names:
            raise WrongColumnError(missing_field(column, "column", names))


def _rows_per_batch(num_rows: int, size_bytes: int) -> int:
    return max(1, min(MAX_BATCH_ROWS, BATCH_BYTES * num_rows // max(1, size_bytes)))
