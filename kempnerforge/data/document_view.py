"""Show a document of prepared data: its tokens, and which of them count. Does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kempnerforge.data.index import Index
from kempnerforge.data.samples import TokenStream
from kempnerforge.data.shard_reader import TokenShard
from kempnerforge.data.tokenizer import BYTES, BYTES_EOS, ByteTokenizer, Tokenizer, load_tokenizer
from kempnerforge.data.tokens import TokenDataset
from kempnerforge.errors import DataError

MAX_TOKENS = 4096
"""So many tokens of a document are shown, unless fewer are asked for."""

BEGIN, END = "[[", "]]"
"""Marks around the text of tokens that count."""


@dataclass(frozen=True)
class DocumentView:
    """The beginning of a document."""

    split: str
    number: int
    num_tokens: int
    ids: np.ndarray
    """Its first ids, int64."""
    counted: np.ndarray | None
    """Which of them count as targets, bool. None: all."""
    texts: tuple[str, ...]
    """The text of each id. That of a character of several tokens is with its last."""

    @property
    def marked(self) -> str:
        """The text, with marks around what counts if not everything does."""
        if self.counted is None:
            return "".join(self.texts)
        edges = np.diff(self.counted.astype(np.int8), prepend=0, append=0)
        parts: list[str] = []
        for text, edge in zip((*self.texts, ""), edges.tolist(), strict=True):
            parts += [BEGIN] * (edge == 1) + [END] * (edge == -1) + [text]
        return "".join(parts)

    def lines(self) -> list[str]:
        """Return how many tokens count, and the text."""
        more = self.num_tokens - self.ids.size
        counted = "all" if self.counted is None else f"{np.count_nonzero(self.counted):,}"
        marks = "" if self.counted is None else f", between {BEGIN} and {END}"
        shown = f", of the first {self.ids.size:,}" if more else ""
        head = f"document {self.number:,} of {self.split}: {self.num_tokens:,} tokens"
        return [
            f"{head}; {counted} count as targets{shown}{marks}",
            self.marked,
            *([f"... and {more:,} more tokens"] if more else []),
        ]

    def facts(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "split": self.split,
            "document": self.number,
            "tokens": self.num_tokens,
            "ids": self.ids.tolist(),
            "counted": None if self.counted is None else self.counted.tolist(),
            "texts": list(self.texts),
        }


def view_document(
    dataset: TokenDataset, split: str, number: int, *, max_tokens: int = MAX_TOKENS
) -> DocumentView:
    """Return the beginning of document ``number`` of ``split``, from 0: up to ``max_tokens`` tokens.

    Raises :class:`DataError` if there is no such document, the data have no documents or tokenizer, or a
    file has the wrong size.
    """
    if dataset.index is None or split not in dataset.shards:
        what = "records no documents (.npy)" if dataset.index is None else f"has no {split} split"
        raise DataError(f"{dataset.path} {what}, so it has no document to show")
    for problem in dataset.problems(contents=False).values():
        raise DataError(f"{problem}. See: kempnerforge data inspect {dataset.path}")
    stream = TokenStream(
        dataset.shards[split], vocab_size=dataset.vocab_size, separator_id=dataset.index.separator_id
    )
    ends = stream.document_ends().astype(np.int64)
    if not 0 <= number < ends.size:
        raise DataError(
            f"{dataset.path}: the {split} split has no document {number:,}; "
            f"its documents are 0 to {ends.size - 1:,}"
        )
    start = int(ends[number - 1]) if number else 0
    num_tokens = int(ends[number]) - start
    ids = np.empty(min(num_tokens, max_tokens), dtype=np.int64)
    stream.read_ids(start, ids)
    counted = None
    if stream.has_counted:
        counted = np.empty(ids.size, dtype=bool)
        stream.read_counted(start, counted)
    texts = _texts(_tokenizer_of(dataset, dataset.index), ids)
    return DocumentView(split, number, num_tokens, ids, counted, texts)


def longest_document(shards: Sequence[TokenShard]) -> int | None:
    """Return the number of tokens of the longest document. None if it is not recorded where documents end."""
    longest = 0
    begun = 0  # tokens of the document that continues in the next shard
    for shard in shards:
        if shard.ends is None:
            return None
        ends = shard.ends.map().astype(np.int64)
        lengths = np.diff(ends, prepend=-begun)
        longest = max(longest, int(lengths.max(initial=0)))
        begun = shard.num_tokens - int(ends[-1]) if ends.size else begun + shard.num_tokens
    return longest


def _tokenizer_of(dataset: TokenDataset, index: Index) -> Tokenizer:
    return ByteTokenizer() if index.tokenizer == BYTES else load_tokenizer(str(dataset.path))


def _texts(tokenizer: Tokenizer, ids: np.ndarray) -> tuple[str, ...]:
    decoder = tokenizer.decoder()
    texts = []
    for token in ids.tolist():
        text = decoder.add(token)
        is_bytes_end = tokenizer.name == BYTES and token == tokenizer.separator_id
        texts.append(text + BYTES_EOS if is_bytes_end else text)
    if texts:
        texts[-1] += decoder.flush()
    return tuple(texts)
