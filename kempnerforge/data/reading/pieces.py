"""Cut documents into pieces."""

from __future__ import annotations

PIECE_BYTES = 256 << 10
"""Longer documents are cut at line ends, because the time that a tokenizer takes grows faster than
linearly with the length of a text."""


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
