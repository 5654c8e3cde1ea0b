"""Read JSON Lines: a JSON object on each line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from kempnerforge.data.reading.items import (
    MAX_DOCUMENT_BYTES,
    MAX_RECORD_BYTES,
    Piece,
    Record,
    Unreadable,
    missing_field,
)
from kempnerforge.data.reading.lines import LineNumbers
from kempnerforge.data.reading.options import ReadOptions
from kempnerforge.data.reading.pieces import cut_document, first_invalid_byte
from kempnerforge.data.reading.streams import BLOCK_BYTES, DamagedStreamError, open_stream
from kempnerforge.data.reading.units import Unit

LONG_LINE_BYTES = 4 << 20
"""Longer lines are parsed in a way that needs no more than a byte of memory for each byte of text."""

CHARACTER = rb"\\u(?!00[0-7])(?:[dD][89abAB]HH\\u[dD][c-fC-F]HH|HHHH)".replace(b"H", b"[0-9a-fA-F]")
ESCAPE = re.compile(rb"(?:%b){1,1000}|\\." % CHARACTER, re.DOTALL)
"""Escapes of characters that are not ASCII, or another escape."""


class _UnreadableLineError(ValueError):
    """Why a line cannot be read."""


def read_json_texts(unit: Unit, options: ReadOptions) -> Iterator[Piece | Unreadable]:
    """Yield the text of each line that begins in ``unit``. Blank lines are left out."""
    source = _LineSource(unit, MAX_DOCUMENT_BYTES)
    for line in source.lines():
        if isinstance(line, Unreadable):
            yield line
            continue
        try:
            parse = _text_of_long if len(line) > LONG_LINE_BYTES else _text_of
            text = parse(line, options.text_field)
        except _UnreadableLineError as error:
            yield source.unreadable(str(error))
        else:
            yield from cut_document(text)


def read_json_records(unit: Unit) -> Iterator[Record | Unreadable]:
    """Yield the object of each line that begins in ``unit``. Blank lines are left out."""
    source = _LineSource(unit, MAX_RECORD_BYTES)
    for line in source.lines():
        if isinstance(line, Unreadable):
            yield line
            continue
        try:
            value = _parse(_decode(line))
            if b"\\u" in line:
                _encode(json.dumps(value, ensure_ascii=False))
        except _UnreadableLineError as error:
            yield source.unreadable(str(error))
        else:
            yield Record(value, source.numbers.current(), len(line))


class _LineSource:
    """The lines that begin in a unit."""

    def __init__(self, unit: Unit, max_bytes: int) -> None:
        self._unit = unit
        self._max_bytes = max_bytes
        # One byte earlier: the line that begins at unit.start follows a line end.
        start = max(0, unit.start - 1)
        self._stream, self._offset = open_stream(unit.file.path, unit.file.compression, start)
        self.numbers = LineNumbers(unit, self._offset)

    def lines(self) -> Iterator[bytearray | Unreadable]:
        """Yield each line that is not blank, or why it cannot be read. The consumer may clear it."""
        with self._stream:
            try:
                if self._unit.start:
                    self._next_line(max_bytes=0)
                    self.numbers.passed += 1
                while self._unit.end is None or self._offset < self._unit.end:
                    line, size_bytes = self._next_line(self._max_bytes)
                    if not size_bytes:
                        return
                    if size_bytes > self._max_bytes:
                        limit = self._max_bytes >> 20
                        yield self.unreadable(
                            f"the line has {size_bytes:,} bytes; at most {limit} MiB are read"
                        )
                    elif line and not line.isspace():
                        yield line
                    self.numbers.passed += 1
            except DamagedStreamError as error:
                yield self.unreadable(str(error))

    def unreadable(self, reason: str) -> Unreadable:
        """Return the error of the current line."""
        return Unreadable(self.numbers.current(), reason)

    def _next_line(self, max_bytes: int) -> tuple[bytearray, int]:
        """Return the next line and its size; a line that is too long is passed and not kept."""
        line = bytearray()
        size_bytes = 0
        while part := self._stream.readline(BLOCK_BYTES):
            size_bytes += len(part)
            if size_bytes <= max_bytes:
                line += part
            else:
                line.clear()
            if part.endswith(b"\n"):
                break
        self._offset += size_bytes
        return line, size_bytes


def _text_of(line: bytearray, field: str) -> bytes:
    return _encode(_field_of(_parse(_decode(line)), field))


def _text_of_long(line: bytearray, field: str) -> bytes:
    """Return what ``_text_of`` does, and clear ``line``.

    Every byte is parsed as a character of its own (Latin-1), so that a single character outside of
    the Basic Multilingual Plane does not make the text take four times its size.
    """
    if (invalid := first_invalid_byte(line)) is not None:
        raise _not_utf8(line, invalid)
    content = _with_characters_for_escapes(line) if b"\\u" in line else bytearray(line)
    line.clear()
    characters = content.decode("latin-1")
    content.clear()
    value = {_from_latin1(key): item for key, item in _parse(characters, is_line=False).items()}
    del characters
    text = _field_of(value, field).encode("latin-1")
    if first_invalid_byte(text) is not None:
        raise _lone_surrogate()
    return text


def _with_characters_for_escapes(line: bytearray) -> bytearray:
    """Replace ``\\u`` escapes of characters that are not ASCII by the bytes of these characters."""
    result = bytearray()
    start = 0
    with memoryview(line) as view:
        for match in ESCAPE.finditer(line):
            result += view[start : match.start()]
            result += _unescaped(match)
            start = match.end()
        result += view[start:]
    return result


def _unescaped(match: re.Match[bytes]) -> bytes:
    if len(match[0]) == 2:
        return match[0]
    units = bytes.fromhex(match[0].replace(b"\\u", b"").decode())
    # Half of a pair becomes bytes that are not UTF-8.
    return units.decode("utf-16-be", "surrogatepass").encode("utf-8", "surrogatepass")


def _from_latin1(text: str) -> str:
    return text.encode("latin-1").decode("utf-8", "replace")


def _decode(line: bytearray) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(line, error.start) from error


def _not_utf8(line: bytearray, position: int) -> _UnreadableLineError:
    return _UnreadableLineError(f"byte {position} of the line (0x{line[position]:02x}) is not UTF-8")


def _encode(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise _lone_surrogate() from error


def _lone_surrogate() -> _UnreadableLineError:
    return _UnreadableLineError("an escape such as \\ud800 is half of a pair, which is not a character")


def _refuse_constant(name: str) -> Any:
    raise _UnreadableLineError(f"{name} is not JSON")


DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _parse(text: str, *, is_line: bool = True) -> dict[str, Any]:
    try:
        value = DECODER.decode(text)
    except _UnreadableLineError:
        raise
    except json.JSONDecodeError as error:
        place = f" at character {error.pos + 1}" if is_line else ""
        raise _UnreadableLineError(f"not JSON: {error.msg}{place}") from error
    except ValueError as error:
        raise _UnreadableLineError(f"not JSON: {error}") from error
    except RecursionError as error:
        raise _UnreadableLineError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise _UnreadableLineError(f"it is {_kind(value)}, not an object")
    return value


def _field_of(value: dict[str, Any], field: str) -> str:
    if field not in value:
        raise _UnreadableLineError(missing_field(field, "field", list(value)))
    text = value[field]
    if not isinstance(text, str):
        raise _UnreadableLineError(f'"{field}" is {_kind(text)}, not text')
    return text


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
