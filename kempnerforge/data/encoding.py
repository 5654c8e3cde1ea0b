"""Turn the units of text files into token ids. Does not import torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kempnerforge.data.reading.documents import read_pieces
from kempnerforge.data.reading.items import Piece, Record, Unreadable
from kempnerforge.data.reading.locations import Location
from kempnerforge.data.reading.options import ReadOptions
from kempnerforge.data.reading.units import Unit
from kempnerforge.data.tokenizer import BYTES, Tokenizer
from kempnerforge.errors import DataError

BATCH_BYTES = 1 << 20
"""Bytes of text per call of the tokenizer, which needs about 25 times as much memory."""

ITEM_BYTES = 256
"""What each document counts in a batch besides its text."""

KNOWN_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>")
"""Texts that separate the documents of published text files."""


@dataclass(frozen=True)
class Encoded:
    """The ids of a document, or of a piece of a long one."""

    ids: np.ndarray
    """Integers [num_tokens]. The first piece of a document has its BOS, the last one its separator."""
    content: bytes
    """What was encoded, for the size and the digest of the document."""
    ends_document: bool
    counted: np.ndarray | None = None
    """Which tokens count as targets in the loss, bool [num_tokens]. None: all."""


@dataclass(frozen=True)
class SeparatorSeen:
    """A text file contains the text of a known separator, which is not used as one."""

    path: Path
    separator: str


@dataclass(frozen=True)
class Notice:
    """What a user should know about the text. The first one ``about`` the same becomes a warning."""

    about: str
    location: Location
    text: str
    """What is there, to be written after the location."""


Item = Piece | Record | Unreadable | SeparatorSeen
Result = Encoded | Unreadable | SeparatorSeen | Notice


@dataclass(frozen=True)
class Batch:
    """Neighbouring items of a unit, which are encoded without looking at others."""

    path: Path
    items: Sequence[Item]
    begins: bool = True
    """Whether the first piece begins a document, or continues one."""


def grouped(items: Iterable[tuple[Item, int]], batch_bytes: int) -> Iterator[Sequence[Item]]:
    """Yield neighbouring ``items``, which come with their sizes, together: about ``batch_bytes`` each."""
    group: list[Item] = []
    size_bytes = 0
    for item, item_bytes in items:
        group.append(item)
        size_bytes += item_bytes
        if size_bytes >= batch_bytes:
            yield group
            group, size_bytes = [], 0
    if group:
        yield group


class Encoder(Protocol):
    """How the units of files become ids. It is sent to other processes by pickle."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer whose ids are written."""
        ...

    @property
    def options(self) -> ReadOptions:
        """How the files are read."""
        ...

    @property
    def may_cut(self) -> bool:
        """Whether the end of a document may be held out, instead of whole documents only."""
        ...

    @property
    def has_counted(self) -> bool:
        """Whether each ``Encoded`` has ``counted``."""
        ...

    @property
    def format(self) -> str:
        """What the files have, as data.format."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """How the ids are made, a line each, for the summary."""
        ...

    def files(self) -> dict[str, bytes]:
        """Return the files of the tokenizer, by name. None for that of bytes."""
        ...

    def key(self) -> dict[str, Any]:
        """Return everything on which the ids of the same text depend, as JSON values."""
        ...

    def read(self, unit: Unit) -> Iterator[Batch]:
        """Yield the content of ``unit`` in order. Each batch may be encoded in another process."""
        ...

    def encode(self, batch: Batch) -> Iterator[Result]:
        """Yield the documents of ``batch`` in order.

        After ``Unreadable``, the caller leaves out the pieces since the last end of a document.

        Raises :class:`DataError`, with the file, if the tokenizer cannot encode them.
        """
        ...


@dataclass(frozen=True)
class TextEncoder:
    """Documents of text, each with the separator after it, and BOS before it if the tokenizer writes one."""

    tokenizer: Tokenizer
    options: ReadOptions = field(default_factory=ReadOptions)
    may_cut = True
    has_counted = False
    format = "text"
    notes = ()

    def files(self) -> dict[str, bytes]:
        """Return the files of the tokenizer."""
        return tokenizer_files(self.tokenizer)

    def key(self) -> dict[str, Any]:
        """Return the digest of the tokenizer, the BOS, and how files are read."""
        return {
            "tokenizer": self.tokenizer.digest,
            "bos_id": self.tokenizer.special.bos_id,
            "options": asdict(self.options),
        }

    def read(self, unit: Unit) -> Iterator[Batch]:
        """Yield the pieces of the documents of ``unit``."""
        begins = True
        for items in grouped(self._items(unit), BATCH_BYTES):
            last = items[-1]
            yield Batch(unit.file.path, items, begins)
            begins = not isinstance(last, Piece) or last.ends_document

    def _items(self, unit: Unit) -> Iterator[tuple[Item, int]]:
        """Yield what ``unit`` has, with the size of each in a batch. A separator is no end of a batch."""
        searched: list[str] = list(KNOWN_SEPARATORS) if self._may_have_separators(unit) else []
        for item in read_pieces(unit, self.options):
            if not isinstance(item, Piece):
                yield item, ITEM_BYTES
                continue
            for separator in [text for text in searched if text.encode() in item.content]:
                searched.remove(separator)
                yield SeparatorSeen(unit.file.path, separator), 0
            yield item, ITEM_BYTES + len(item.content)

    def _may_have_separators(self, unit: Unit) -> bool:
        return unit.file.format == "text" and self.options.document_separator is None

    def encode(self, batch: Batch) -> Iterator[Encoded | Unreadable | SeparatorSeen]:
        """Yield the pieces of documents, with the tokens around each document."""
        special = self.tokenizer.special
        bos = np.array([] if special.bos_id is None else [special.bos_id])
        separator = np.array([self.tokenizer.separator_id])
        pieces = [item for item in batch.items if isinstance(item, Piece)]
        try:
            encoded = iter(self.tokenizer.encode_batch([piece.content for piece in pieces]))
        except DataError as error:
            raise DataError(f"{batch.path}: {error}") from error
        begins = batch.begins
        for item in batch.items:
            if isinstance(item, Piece):
                ids = next(encoded)
                around = [bos[: bos.size * begins], ids, separator[: int(item.ends_document)]]
                ids = np.concatenate([part.astype(ids.dtype, copy=False) for part in around])
                yield Encoded(ids, item.content, item.ends_document)
                begins = item.ends_document
            elif isinstance(item, Unreadable | SeparatorSeen):
                begins |= isinstance(item, Unreadable)
                yield item


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Return the files of ``tokenizer`` to store beside its ids. None for bytes, which need none."""
    return {} if tokenizer.name == BYTES else tokenizer.files()
