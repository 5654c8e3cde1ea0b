"""The text of a file as a stream of UTF-8: decompressed, decoded from UTF-16, without byte-order mark."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from kempnerforge.errors import DataError

Compression = Literal["gzip", "zstd"]

BLOCK_BYTES = 1 << 20
"""Bytes per read of a file."""

ZSTD_INPUT_BYTES = 1 << 10
"""Compressed bytes per call. 4 bytes can become 128 KiB, so this bounds the output of a call to 32 MiB."""

ZSTD_WINDOW_BYTES = 128 << 20
"""Most memory that a zstd frame may ask for, as in the ``zstd`` command without ``--long``."""

UTF16_MARKS = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
MARK_BYTES = 4
"""Length of the longest byte-order mark. A read returns no fewer, so that none is overlooked."""
UTF32_MARKS = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)


class DamagedStreamError(Exception):
    """The rest of a stream cannot be read."""


class StorageError(DataError):
    """Storage did not answer. Nothing is known about the text itself."""


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Raise errors of storage as ``StorageError`` that names ``path``."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"text file {path}: cannot be read: {error.strerror or error}") from error


def open_file(path: Path, *, buffering: int = BLOCK_BYTES) -> io.BufferedReader:
    """Open ``path`` for reading."""
    return io.BufferedReader(io.FileIO(path), buffering)


def open_stream(path: Path, compression: Compression | None, start: int = 0) -> tuple[io.BufferedReader, int]:
    """Open the text of ``path`` at ``start``. Return the stream, and the offset of its first byte.

    Offsets count bytes of uncompressed UTF-8, with the byte-order mark that the stream leaves out.
    ``start`` is for uncompressed UTF-8 only. Reading raises ``DamagedStreamError``, after everything
    before the damage has been returned.
    """
    file = open_file(path)
    try:
        if start:
            file.seek(start)
            return file, start
        return _as_utf8(file if compression is None else decompressed(file, compression))
    except BaseException:
        file.close()
        raise


def decompressed(file: io.BufferedReader, compression: Compression) -> io.BufferedReader:
    """Return what ``file`` contains: all members of gzip, all frames of zstd."""
    raw = _Gzip(file) if compression == "gzip" else _Zstd(file)
    return io.BufferedReader(raw, BLOCK_BYTES)


def _as_utf8(stream: io.BufferedReader) -> tuple[io.BufferedReader, int]:
    try:
        head = stream.peek(3)
    except DamagedStreamError:
        return stream, 0  # the next read raises it again
    if encoding := UTF16_MARKS.get(head[:2]):
        stream.read(2)
        return io.BufferedReader(_Utf16(stream, encoding), BLOCK_BYTES), 0
    if head.startswith(codecs.BOM_UTF8):
        stream.read(len(codecs.BOM_UTF8))
        return stream, len(codecs.BOM_UTF8)
    return stream, 0


class _Source(io.RawIOBase):
    """A stream that is made of another one, block by block."""

    def __init__(self, source: io.BufferedReader) -> None:
        super().__init__()
        self._source = source
        self._ready = memoryview(b"")
        self._damage: DamagedStreamError | None = None
        self._at_end = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while len(self._ready) < MARK_BYTES and not self._at_end:
            try:
                block = self._next_block()
            except DamagedStreamError as error:
                block, self._damage = None, error
            self._at_end = block is None
            self._ready = memoryview(bytes(self._ready) + (block or b""))
        if self._damage is not None and not self._ready:
            raise self._damage
        target = memoryview(buffer).cast("B")
        count = min(len(target), len(self._ready))
        target[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._source.close()
        super().close()

    def _next_block(self) -> bytes | None:
        """Return the next bytes, which may be empty, or None at the end."""
        raise NotImplementedError


class _Gzip(_Source):
    def __init__(self, source: io.BufferedReader) -> None:
        super().__init__(source)
        self._members = gzip.GzipFile(fileobj=source)

    def _next_block(self) -> bytes | None:
        try:
            return self._members.read1(BLOCK_BYTES) or None
        except EOFError as error:
            raise DamagedStreamError("the gzip data are cut off") from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise DamagedStreamError(f"the gzip data cannot be decompressed ({error})") from error


class _Zstd(_Source):
    def __init__(self, source: io.BufferedReader) -> None:
        super().__init__(source)
        self._new_frame, self._error = _zstd_decoder()
        self._frame: Any = None
        self._input = b""

    def _next_block(self) -> bytes | None:
        data = self._input or self._source.read(ZSTD_INPUT_BYTES)
        if not data:
            if self._frame is not None:
                raise DamagedStreamError("the zstd data are cut off")
            return None
        self._frame = self._frame or self._new_frame()
        try:
            block = self._frame.decompress(data)
        except self._error as error:
            raise DamagedStreamError(f"the zstd data cannot be decompressed ({error})") from error
        self._input = b""
        if self._frame.eof:
            self._input = self._frame.unused_data
            self._frame = None
        return block


def _zstd_decoder() -> tuple[Callable[[], Any], type[Exception]]:
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise DataError(
            'zstd data are read by the package zstandard: pip install "kempnerforge[data]"'
        ) from error
    decoder = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES)
    return decoder.decompressobj, zstandard.ZstdError


class _Utf16(_Source):
    def __init__(self, source: io.BufferedReader, encoding: str) -> None:
        super().__init__(source)
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._read_bytes = 2

    def _next_block(self) -> bytes | None:
        block = self._source.read1(BLOCK_BYTES)
        held_back = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            offset = self._read_bytes - held_back + error.start
            raise DamagedStreamError(f"byte {offset} is not UTF-16 ({error.reason})") from error
        self._read_bytes += len(block)
        return text.encode() if block else None
