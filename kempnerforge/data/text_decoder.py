"""Turn generated ids into text while they are generated. Does not import torch."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_CONTEXT = 16
"""Ids of the prompt from which a decoder sees how its text continues."""
MAX_INCOMPLETE = 64
"""Ids without a complete character after which a decoder returns U+FFFD for them."""


class TextDecoder(Protocol):
    """Turns ids into text, one at a time. All texts together are the text of all ids."""

    def add(self, token: int) -> str:
        """Return the text that ``token`` completes. It is empty inside a character."""
        ...

    def flush(self) -> str:
        """Return the rest: U+FFFD for each incomplete character."""
        ...


class ByteDecoder:
    """UTF-8, with each invalid byte as U+FFFD. The separator has no text."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """Return the text that ``token`` completes."""
        return self._utf8.decode(bytes([token])) if token < 256 else self.flush()

    def flush(self) -> str:
        """Return U+FFFD for an incomplete character."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class WindowDecoder:
    """Decode the last ids with and without the new one. The difference is the new text.

    The ids of the text before belong to the window, because tokenizers join words differently at
    the beginning of a text.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = [*context][-MAX_CONTEXT:]
        self._shown = len(self._ids)
        """The number of ids whose text was returned."""

    def add(self, token: int) -> str:
        """Return the text that ``token`` completes."""
        self._ids.append(token)
        text = self._new_text()
        # A character of several ids decodes as U+FFFD until it is complete.
        if text and not text.endswith("\ufffd"):
            self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
            return text
        return self.flush() if len(self._ids) - self._shown == MAX_INCOMPLETE else ""

    def flush(self) -> str:
        """Return the text of all ids since the last text, and begin anew."""
        text = self._new_text()
        self._ids, self._shown = [], 0
        return text

    def _new_text(self) -> str:
        before = self._decode(self._ids[: self._shown])
        return self._decode(self._ids)[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)
