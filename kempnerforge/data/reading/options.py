"""How text files are read."""

from __future__ import annotations

from dataclasses import dataclass

from kempnerforge.errors import DataError


@dataclass(frozen=True)
class ReadOptions:
    """What the readers of all formats need to know."""

    text_field: str = "text"
    """Field of a JSON line, or column of a table, that has the text of a document."""
    document_separator: str | None = None
    """Text between the documents of a text file. None: a text file is one document."""
    skip_unreadable: bool = False
    """Report what cannot be read as :class:`~kempnerforge.data.reading.items.Unreadable` instead of
    raising :class:`DataError`."""

    def __post_init__(self) -> None:
        if self.document_separator == "":
            raise DataError("data.document_separator is empty; leave it out to read a file as one document")
