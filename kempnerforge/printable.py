"""Escape text from other users before it is printed to a terminal or a log.

In a shared folder, control characters in the name or content of a file could move the cursor, set
the window title, or hide lines on the terminal of another user.
"""

from __future__ import annotations

import re
from typing import Any, TextIO

_UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line separators, bidirectional controls, and surrogates (undecodable bytes)."""
_UNFIT_BUT_LINES = re.compile(_UNFIT.pattern.replace("\x00-\x1f", "\x00-\x08\x0b-\x1f"))
_COLOUR = re.compile("(\x1b\\[[0-9;]*m)")


def printable(text: str, *, lines: bool = False) -> str:
    """Return ``text`` with each unsafe character escaped as in Python, such as ``\\x1b``.

    With ``lines``, line breaks and tabs are kept, for messages that contain text from others.
    """
    return (_UNFIT_BUT_LINES if lines else _UNFIT).sub(_escaped, text)


def printable_output(text: str) -> str:
    """Return the output of a command with unsafe characters escaped, except line breaks, tabs and colours."""
    return "".join(
        part if index % 2 else printable(part, lines=True) for index, part in enumerate(_COLOUR.split(text))
    )


class PrintableStream:
    """A text stream that applies ``printable_output``. Not for output that moves the cursor."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write ``text`` with unsafe characters escaped and return the length of ``text``."""
        self._stream.write(printable_output(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
