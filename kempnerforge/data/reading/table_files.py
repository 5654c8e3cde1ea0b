"""Open Parquet and Arrow files and read their rows in batches of bounded size."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kempnerforge.data.reading.heads import ARROW_FILE_MARK
from kempnerforge.data.reading.items import missing_field
from kempnerforge.data.reading.streams import BLOCK_BYTES, open_file
from kempnerforge.errors import DataError

BATCH_BYTES = 4 << 20
"""Rows are read in batches of about this size."""

MAX_BATCH_ROWS = 1024


class DamagedTableError(Exception):
    """The rest of a table cannot be read."""


class WrongColumnError(DamagedTableError):
    """A table has no column of text with the name that was asked for."""


def part_sizes(path: Path, format_: str) -> list[int]:
    """Return the bytes of each row group (Parquet) or record batch (Arrow), uncompressed.

    An Arrow stream that is cut off has the batches before the cut. Raises ``DamagedTableError``, and
    :class:`DataError` if pyarrow is not installed.
    """
    with _arrow_errors(path):
        if format_ == "parquet":
            with _open_parquet(path) as table:
                metadata = table.metadata
                return [metadata.row_group(n).total_byte_size for n in range(metadata.num_row_groups)]
    sizes: list[int] = []
    try:
        for batch in _ArrowFile(path, None).batches(0, None):
            sizes.append(batch.nbytes)
    except DamagedTableError:
        if not sizes:
            raise
    return sizes


def read_batches(
    path: Path, format_: str, start: int, end: int | None, columns: Sequence[str] | None
) -> Iterator[tuple[int, Any]]:
    """Yield the rows of the parts ``start`` to ``end``: the number of the first row, and a record batch.

    ``columns`` None means all. A batch must not be used after the next one was asked for. Memory grows
    with the largest page of a Parquet file, which pyarrow decompresses as a whole, and with the
    largest compressed batch of an Arrow file.

    Raises ``DamagedTableError``, and :class:`DataError` if pyarrow is not installed.
    """
    read = _parquet_batches if format_ == "parquet" else _arrow_batches
    yield from read(path, start, end, columns)


def _parquet_batches(
    path: Path, start: int, end: int | None, columns: Sequence[str] | None
) -> Iterator[tuple[int, Any]]:
    with _arrow_errors(path), _open_parquet(path) as table:
        metadata = table.metadata
        _require_columns(table.schema_arrow.names, columns)
        row = 1 + sum(metadata.row_group(n).num_rows for n in range(start))
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
    path: Path, start: int, end: int | None, columns: Sequence[str] | None
) -> Iterator[tuple[int, Any]]:
    table = _ArrowFile(path, columns)
    row = 1 + sum(batch.num_rows for batch in table.batches(0, start))
    for batch in table.batches(start, end):
        count = _rows_per_batch(batch.num_rows, batch.nbytes)
        for first in range(0, batch.num_rows, count):
            yield row + first, batch.slice(first, count)
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

    def batches(self, start: int, end: int | None) -> Iterator[Any]:
        """Yield the record batches ``start`` to ``end``, whose buffers have the sizes that they need."""
        with _arrow_errors(self._path):
            reader = self._open()
            if not self._is_stream:
                for number in range(start, reader.num_record_batches if end is None else end):
                    batch = reader.get_batch(number)
                    batch.validate()
                    yield batch if self._columns is None else batch.select(self._columns)
                return
            for number, batch in enumerate(reader):
                if end is not None and number >= end:
                    return
                if number >= start:
                    batch.validate()
                    yield batch

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
