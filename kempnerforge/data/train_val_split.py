"""Choose the documents, or the end of a single one, that are held out for validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kempnerforge.data.corpus import Document, read_document


@dataclass(frozen=True)
class DocumentPart:
    """The bytes ``start`` to ``end`` of a document. ``end`` None means the end of the document."""

    document: Document
    start: int = 0
    end: int | None = None


def split_documents(documents: Sequence[Document], val_fraction: float) -> dict[str, list[DocumentPart]]:
    """Assign every document to ``train`` or ``val``, in the given order. Empty splits are omitted.

    A document is held out if its digest, as a fraction of 2^128, is below ``val_fraction``. This
    selects about that fraction of the documents, and the choice for one document does not change
    when others are added or moved. Equal documents are in the same split. With two or more
    different documents each split gets at least one. A single document is cut near its end instead,
    at a line end.
    """
    if val_fraction <= 0:
        return {"train": [DocumentPart(document) for document in documents]}
    if len(documents) == 1:
        return _cut_document(documents[0], val_fraction)
    held_out = _held_out({document.digest for document in documents}, val_fraction)
    splits: dict[str, list[DocumentPart]] = {"train": [], "val": []}
    for document in documents:
        splits["val" if document.digest in held_out else "train"].append(DocumentPart(document))
    return {name: parts for name, parts in splits.items() if parts}


def line_end_before(content: bytes, start: int, target: int) -> int:
    """Return a position in (start, target] at which to cut ``content``.

    The position is after the last line end that no white space follows, where tokenizers cut too.
    If there is none, it is after the last line end. Without any line end it is ``target``, moved
    back to the start of a UTF-8 character.
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


def _held_out(digests: set[str], val_fraction: float) -> set[str]:
    threshold = val_fraction * 2.0**128
    chosen = {digest for digest in digests if int(digest, 16) < threshold}
    if len(digests) < 2:
        return set()
    if not chosen:
        return {min(digests)}
    if chosen == digests:
        return chosen - {max(digests)}
    return chosen


def _cut_document(document: Document, val_fraction: float) -> dict[str, list[DocumentPart]]:
    content = read_document(document)
    target = len(content) - max(1, round(len(content) * val_fraction))
    if target <= 0:
        return {"train": [DocumentPart(document)]}
    cut = line_end_before(content, 0, target)
    return {"train": [DocumentPart(document, 0, cut)], "val": [DocumentPart(document, cut)]}
