"""The samples of one split of token shards: rows of the stream of tokens, or rows of whole documents.

Shape suffixes: N samples, T inputs of a sample (``seq_len``). This module does not import torch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from kempnerforge.data.packing import Packing
from kempnerforge.data.rows import Rows
from kempnerforge.data.shard_reader import SCAN_TOKENS, TokenShard, ids_problem
from kempnerforge.errors import DataError

MAX_OPEN_FILES = 256
"""A mapped file holds a file descriptor, and the usual limit is 1,024."""


@dataclass(frozen=True)
class _MappedShard:
    path: Path
    ids: np.ndarray
    ends: np.ndarray | None
    counted: np.ndarray | None


class TokenStream:
    """The tokens of one split, as if its shards were one file. Offsets are in tokens from its beginning."""

    def __init__(
        self, shards: tuple[TokenShard, ...], *, vocab_size: int | None, separator_id: int | None
    ) -> None:
        self.num_tokens = sum(shard.num_tokens for shard in shards)
        self.vocab_size = vocab_size
        self.separator_id = separator_id
        """The token after each document. None if it is not known (``.npy``)."""
        self.has_counted = any(shard.counted is not None for shard in shards)
        self._shards = shards
        self._starts = np.cumsum([0, *(shard.num_tokens for shard in shards)])
        max_shards = max(1, MAX_OPEN_FILES // max(len(shard.files) for shard in shards))
        # Not a method: its cache would keep this object, and the open files, until a collection of cycles.
        self._map = functools.lru_cache(maxsize=max_shards)(functools.partial(_mapped, shards))

    def read_ids(self, start: int, out: np.ndarray) -> None:
        """Fill ``out`` with the ids from ``start`` on."""
        for at, shard, part in self._parts(start, out.size):
            out[at : at + part.stop - part.start] = shard.ids[part]

    def take_ids(self, places: np.ndarray) -> np.ndarray:
        """Return the ids at ``places``, int64 [N]."""
        out = np.empty(places.size, dtype=np.int64)
        for shard, own, offsets in self._by_shard(places):
            out[own] = shard.ids[offsets]
        return out

    def take_counted(self, places: np.ndarray) -> np.ndarray:
        """Return whether the tokens at ``places`` [N] count as targets, bool [N]."""
        out = np.ones(places.size, dtype=bool)
        for shard, own, offsets in self._by_shard(places):
            if shard.counted is not None:
                out[own] = shard.counted[offsets]
        return out

    def read_counted(self, start: int, out: np.ndarray) -> None:
        """Fill ``out``, bool, with whether the tokens from ``start`` on count as targets."""
        for at, shard, part in self._parts(start, out.size):
            out[at : at + part.stop - part.start] = True if shard.counted is None else shard.counted[part]

    def mark_ends(self, start: int, out: np.ndarray) -> None:
        """Set ``out``, bool, to whether each token from ``start`` on is the last of its document.

        Raises :class:`DataError` if the ends are damaged.
        """
        out[:] = False
        for at, shard, part in self._parts(start, out.size):
            if shard.ends is None:
                out[at : at + part.stop - part.start] = shard.ids[part] == self.separator_id
            else:
                # Of another dtype, NumPy would convert all ends of the shard.
                edges = np.array([part.start, part.stop], dtype=shard.ends.dtype)
                first, stop = np.searchsorted(shard.ends, edges, side="right")
                places = shard.ends[first:stop].astype(np.int64) - (1 + part.start)
                if places.size and not 0 <= places.min() <= places.max() < part.stop - part.start:
                    raise _damaged_ends(shard)
                out[at + places] = True

    def document_ends(self) -> np.ndarray:
        """Return the offsets after all documents, uint64, not decreasing, the end of the split included.

        Raises :class:`DataError` if the ends are damaged.
        """
        ends = [np.empty(0, dtype=np.uint64)]
        for number, shard_start in enumerate(self._starts[:-1]):
            shard = self._map(number)
            if shard.ends is not None:
                if (shard.ends[:-1] > shard.ends[1:]).any() or (shard.ends[-1:] > shard.ids.size).any():
                    raise _damaged_ends(shard)
                ends.append(shard.ends + np.uint64(shard_start))
                continue
            for block in range(0, shard.ids.size, SCAN_TOKENS):
                found = np.flatnonzero(shard.ids[block : block + SCAN_TOKENS] == self.separator_id)
                ends.append((found + (1 + block + int(shard_start))).astype(np.uint64))
        found = np.concatenate(ends)
        complete = found.size and found[-1] == self.num_tokens
        return found if complete else np.append(found, np.uint64(self.num_tokens))

    def documents_digest(self) -> str | None:
        """Return the xxh3-128 of ``document_ends``, or None if only the separators tell where documents end.

        It does not depend on the shards.
        """
        digest = xxhash.xxh3_128()
        for number, shard_start in enumerate(self._starts[:-1]):
            ends = self._map(number).ends
            if ends is None:
                return None
            digest.update((ends + np.uint64(shard_start)).data.cast("B"))
        return digest.hexdigest()

    def check_ids(self, rows: np.ndarray) -> None:
        """Raise :class:`DataError` if ``rows`` have an id outside the vocabulary."""
        if rows.size and (problem := ids_problem(int(rows.min()), int(rows.max()), self.vocab_size)):
            raise DataError(f"{self._shards[0].path.parent}: {problem}")

    def _parts(self, start: int, count: int) -> Iterator[tuple[int, _MappedShard, slice]]:
        """Yield each shard's part of ``count`` tokens from ``start`` on: (tokens before it, shard, place)."""
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        done = 0
        while done < count:
            offset = start + done - int(self._starts[number])
            stop = min(offset + count - done, self._shards[number].num_tokens)
            yield done, self._map(number), slice(offset, stop)
            done += stop - offset
            number += 1

    def _by_shard(self, places: np.ndarray) -> Iterator[tuple[_MappedShard, np.ndarray, np.ndarray]]:
        """Yield, for each shard, which of ``places`` [N] are in it, and their offsets in it."""
        numbers = np.searchsorted(self._starts, places, side="right") - 1
        order = np.argsort(numbers, kind="stable")
        borders = np.flatnonzero(np.diff(numbers[order])) + 1
        for own in np.split(order, borders) if order.size else ():
            number = int(numbers[own[0]])
            yield self._map(number), own, places[own] - self._starts[number]


def _mapped(shards: tuple[TokenShard, ...], number: int) -> _MappedShard:
    shard = shards[number]
    return _MappedShard(
        shard.path,
        shard.map(),
        shard.ends.map() if shard.ends is not None else None,
        shard.counted.map() if shard.counted is not None else None,
    )


def _damaged_ends(shard: _MappedShard) -> DataError:
    path = shard.path.with_suffix(".ends")
    return DataError(f"{path}: damaged. See: kempnerforge data inspect {path.parent}")


class Samples:
    """The samples of one split: sample ``i`` is tokens ``i * seq_len`` to ``(i + 1) * seq_len``, inclusive.

    Neighbours share one token: the last target of one sample is the first input of the next. With
    ``document_mask``, the rows have the numbers of their documents, and the first token of a document
    does not count as a target.
    """

    def __init__(
        self,
        stream: TokenStream,
        seq_len: int,
        *,
        first_sample: int = 0,
        num_samples: int,
        document_mask: bool = False,
    ) -> None:
        self.seq_len = seq_len
        self.num_samples = num_samples
        self._stream = stream
        self._first_sample = first_sample
        self._document_mask = document_mask

    @property
    def counts_all(self) -> bool:
        """Whether all targets of every row count."""
        return not (self._document_mask or self._stream.has_counted)

    def describe(self) -> str:
        """Return the number and the length of the samples, for a log."""
        return f"{self.num_samples:,} samples of {self.seq_len} tokens"

    def read(self, ids: np.ndarray) -> Rows:
        """Return samples ``ids`` [N]. They may span shards.

        Raises IndexError for a sample that does not exist, and :class:`DataError` for a token id
        outside the vocabulary.
        """
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.num_samples:
            raise IndexError(f"{ids.min()} to {ids.max()} are not in samples 0 to {self.num_samples - 1}")
        rows = self._read(ids)
        self._stream.check_ids(rows.tokens)
        return rows

    def _read(self, ids: np.ndarray) -> Rows:
        starts = ((ids + self._first_sample) * self.seq_len).tolist()
        tokens = np.empty((ids.size, self.seq_len + 1), dtype=np.int64)
        for row, start in zip(tokens, starts, strict=True):
            self._stream.read_ids(start, row)
        counted = document_ids = None
        if self._stream.has_counted:
            counted = np.empty((ids.size, self.seq_len), dtype=bool)
            for row, start in zip(counted, starts, strict=True):
                self._stream.read_counted(start + 1, row)
        if self._document_mask:
            is_last = np.empty((ids.size, self.seq_len), dtype=bool)
            for row, start in zip(is_last, starts, strict=True):
                self._stream.mark_ends(start, row)
            # The token after the last one of a document is not of the document.
            counted = ~is_last if counted is None else counted & ~is_last
            document_ids = np.zeros((ids.size, self.seq_len), dtype=np.int32)
            np.cumsum(is_last[:, :-1], axis=1, out=document_ids[:, 1:])
        return Rows(tokens, counted, document_ids)


class PackedSamples(Samples):
    """Samples of whole documents and pieces of long ones (see :mod:`kempnerforge.data.packing`).

    The rest of a row is filled with separators, which count nothing and are a document of their own.
    Documents are unrelated, so targets across them do not count, with or without a document mask.
    """

    def __init__(self, stream: TokenStream, seq_len: int, packing: Packing, *, document_mask: bool) -> None:
        super().__init__(stream, seq_len, num_samples=packing.num_rows, document_mask=document_mask)
        self._packing = packing

    @property
    def counts_all(self) -> bool:
        """Padding never counts."""
        return False

    def describe(self) -> str:
        """Return the number and the length of the samples, and which share of the inputs has a target."""
        pieces, rows = self._packing.starts.size, self.num_samples
        filled = self._packing.num_targets / (rows * self.seq_len)
        return f"{super().describe()}, {pieces / rows:.1f} documents in each, {filled:.2%} filled"

    def _read(self, ids: np.ndarray) -> Rows:
        first, stop = (self._packing.first_piece[rows].astype(np.int64) for rows in (ids, ids + 1))
        counts = stop - first
        row = np.repeat(np.arange(ids.size), counts)
        number = _ranges(counts)  # of each piece in its row
        piece = first[row] + number
        starts, lengths = (
            array[piece].astype(np.int64) for array in (self._packing.starts, self._packing.lengths)
        )
        # Of each token: how far it is in its piece, its place in the data, and in the rows.
        within = _ranges(lengths)
        source = np.repeat(starts, lengths) + within
        width = self.seq_len + 1
        filled = np.bincount(row, weights=lengths, minlength=ids.size).astype(np.int64)
        place = np.repeat(np.arange(ids.size) * width, filled) + _ranges(filled)
        tokens = np.full((ids.size, width), self._stream.separator_id, dtype=np.int64)
        tokens.ravel()[place] = self._stream.take_ids(source)
        counted = np.zeros((ids.size, width), dtype=bool)
        counted.ravel()[place] = within > 0
        if self._stream.has_counted:
            counted.ravel()[place] &= self._stream.take_counted(source)
        if not self._document_mask:
            return Rows(tokens, counted[:, 1:])
        numbers = np.repeat(counts.astype(np.int32), width).reshape(-1, width)
        numbers.ravel()[place] = np.repeat(number, lengths)
        return Rows(tokens, counted[:, 1:], numbers[:, :-1])


def _ranges(counts: np.ndarray) -> np.ndarray:
    """Return 0, 1, ... ``count - 1`` for each of ``counts``, one after the other, int64."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
