"""Text that somebody else may have written, made fit for a terminal or a log.

Whoever may write to a shared folder could move the cursor, set the title of the window, or hide a line of
another user's terminal with control characters in a file's name or content.
"""

from __future__ import annotations

import re
from typing import Any, TextIO

_UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line separators, what turns the direction of text, and bytes that are no text."""
_UNFIT_BUT_LINES = re.compile(_UNFIT.pattern.replace("\x00-\x1f", "\x00-\x08\x0b-\x1f"))
_COLOUR = re.compile("(\x1b\\[[0-9;]*m)")


def printable(text: str, *, lines: bool = False) -> str:
    """``text`` with each unfit character as Python writes it, such as ``\\x1b``.

    ``lines``: line breaks and tabs stay, for text of our own that has parts of others in it.
    """
    return (_UNFIT_BUT_LINES if lines else _UNFIT).sub(_escaped, text)


def printable_output(text: str) -> str:
    """The same for all that a command prints: line breaks, tabs and colours stay."""
    return "".join(
        part if place % 2 else printable(part, lines=True) for place, part in enumerate(_COLOUR.split(text))
    )


class PrintableStream:
    """A text stream that ``printable_output`` goes before. Not for what moves the cursor itself."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write ``text`` with unfit characters replaced. Returns the characters of ``text``."""
        self._stream.write(printable_output(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
