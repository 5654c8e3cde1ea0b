"""Cut documents into pieces, and find bytes that are not UTF-8."""

from __future__ import annotations

from collections.abc import Iterator

from kempnerforge.data.reading.items import Piece

PIECE_BYTES = 256 << 10
"""Longer documents are cut at line ends, because the time that a tokenizer takes grows faster than
linearly with the length of a text."""

WINDOW_BYTES = 1 << 20
"""Bytes that are decoded at a time. A character of text can take 4 bytes of memory for each of them."""


def line_end_before(content: bytes | bytearray, start: int, target: int) -> int:
    """Return a position in (start, target] at which to cut ``content``.

    The position is after the last line end that no white space follows, where tokenizers cut too.
    If there is none, it is after the last line end. Without any line end it is ``target``, moved
    back to the start of a UTF-8 character. Only bytes up to and including ``target`` are looked at.
    """
    first_found = -1
    position = content.rfind(b"\n", start, target)
    while position >= 0:
        if first_found < 0:
            first_found = position + 1
        if not content[position + 1 : position + 2].isspace():
            return position + 1
        position = content.rfind(b"\n", start, position)
    if first_found > 0:
        return first_found
    cut = target
    while cut > start + 1 and cut > target - 3 and content[cut : cut + 1] and content[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut


def cut_document(content: bytes | memoryview) -> Iterator[Piece]:
    """Yield the pieces of a whole document. Nothing if it is empty."""
    start = 0
    while len(content) - start > PIECE_BYTES:
        window = bytes(content[start : start + PIECE_BYTES + 1])
        cut = line_end_before(window, 0, PIECE_BYTES)
        yield Piece(window[:cut], ends_document=False)
        start += cut
    if content:
        yield Piece(bytes(content[start:]), ends_document=True)


def first_invalid_byte(content: bytes | bytearray | memoryview) -> int | None:
    """Return the position of the first byte that is not valid UTF-8, or None."""
    start = 0
    while start < len(content):
        window = content[start : start + WINDOW_BYTES]
        try:
            str(window, "utf-8")
        except UnicodeDecodeError as error:
            if start + len(window) == len(content) or error.reason != "unexpected end of data":
                return start + error.start
            start += error.start
        else:
            start += len(window)
    return None
