"""Read text files, of which each is one document or several with separators between them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

from kempnerforge.data.reading.items import Piece, Unreadable
from kempnerforge.data.reading.lines import LineNumbers
from kempnerforge.data.reading.options import ReadOptions
from kempnerforge.data.reading.pieces import PIECE_BYTES, first_invalid_byte, line_end_before
from kempnerforge.data.reading.streams import BLOCK_BYTES, DamagedStreamError, open_stream
from kempnerforge.data.reading.units import Unit


def read_text(unit: Unit, options: ReadOptions) -> Iterator[Piece | Unreadable]:
    """Yield the documents that begin in ``unit``.

    Separators that overlap are one. With a separator, documents of white space alone are left out.
    """
    file = unit.file
    separator = (options.document_separator or "").encode()
    # A document begins where a separator ends, so this separator is the first that matters.
    stream, offset = open_stream(file.path, file.compression, max(0, unit.start - len(separator)))
    lines = LineNumbers(unit, offset)
    splitter = _Splitter(stream, separator, offset, lines)
    broken = in_document = False
    with stream:
        try:
            for part in splitter.parts(unit):
                invalid = None if broken else first_invalid_byte(part.content)
                is_whole = part.ends_document and not in_document
                if invalid is not None:
                    broken = True
                    location = lines.current(part.content.count(b"\n", 0, invalid))
                    value = part.content[invalid]
                    yield Unreadable(location, f"byte {part.offset + invalid} (0x{value:02x}) is not UTF-8")
                    if not separator:
                        return
                elif not broken and not (is_whole and _is_blank(part.content, options)):
                    yield Piece(part.content, part.ends_document)
                in_document = not part.ends_document
                broken = broken and in_document
        except DamagedStreamError as error:
            yield Unreadable(lines.current(), str(error))


def _is_blank(content: bytes, options: ReadOptions) -> bool:
    return not content or (options.document_separator is not None and content.isspace())


@dataclass(frozen=True)
class _Part:
    offset: int
    content: bytes
    ends_document: bool


class _Splitter:
    """Splits a stream at separators, and long documents into parts, with a buffer of bounded size."""

    def __init__(self, stream: io.BufferedReader, separator: bytes, offset: int, lines: LineNumbers) -> None:
        self._stream = stream
        self._separator = separator
        self._lines = lines
        self._offset = offset
        """Of the first byte in the buffer."""
        self._buffer = bytearray()
        self._at_end = False

    def parts(self, unit: Unit) -> Iterator[_Part]:
        """Yield the parts of the documents that begin in ``unit``. An empty document is an empty part."""
        if unit.start and not self._skip_to_separator(unit):
            return
        while unit.end is None or self._offset < unit.end:
            yield from self._document()
            if not self._buffer:
                return
            self._pass_separator()

    def _document(self) -> Iterator[_Part]:
        """Yield the parts of a document. Then the buffer begins with a separator, or the stream has ended."""
        while True:
            found = self._find_separator()
            known = found if found >= 0 else len(self._buffer) - self._held_back()
            while known > PIECE_BYTES:
                cut = line_end_before(self._buffer, 0, PIECE_BYTES)
                yield _Part(self._offset, bytes(self._buffer[:cut]), ends_document=False)
                self._drop(cut)
                known -= cut
            if found >= 0 or self._at_end:
                yield _Part(self._offset, bytes(self._buffer[:known]), ends_document=True)
                self._drop(known)
                return
            self._fill()

    def _skip_to_separator(self, unit: Unit) -> bool:
        """Pass the first separator. Return whether it was found before the end of the unit."""
        while (found := self._find_separator()) < 0:
            self._drop(len(self._buffer) - self._held_back())
            if self._at_end or (unit.end is not None and self._offset >= unit.end):
                return False
            self._fill()
        self._drop(found)
        self._pass_separator()
        return True

    def _find_separator(self) -> int:
        return self._buffer.find(self._separator) if self._separator else -1

    def _held_back(self) -> int:
        """Return how many bytes at the end of the buffer may be the beginning of a separator."""
        return 0 if self._at_end else min(len(self._buffer), max(0, len(self._separator) - 1))

    def _pass_separator(self) -> None:
        width = len(self._separator)
        while True:
            while len(self._buffer) < 2 * width - 1 and not self._at_end:
                self._fill()
            overlapping = self._buffer.find(self._separator, 1, 2 * width - 1)
            self._drop(overlapping if overlapping > 0 else width)
            if overlapping < 0:
                return

    def _fill(self) -> None:
        block = self._stream.read1(BLOCK_BYTES)
        self._buffer += block
        self._at_end = not block

    def _drop(self, count: int) -> None:
        self._lines.passed += self._buffer.count(b"\n", 0, count)
        self._offset += count
        del self._buffer[:count]
