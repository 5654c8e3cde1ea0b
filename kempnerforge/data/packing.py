"""Put documents into rows so that those that fit a row are not cut: best-fit-decreasing bin packing.

Ding et al., "Fewer Truncations Improve Language Modeling", arXiv:2404.10830. A row has ``seq_len + 1``
tokens, of which the last is only a target. A *piece* is a part of a document that stands in one row.

- A document of at most ``seq_len + 1`` tokens, its separator included, is one piece.
- A longer one is cut after every ``seq_len`` targets. Neighbouring pieces share a token, as contiguous
  samples do: the last target of one is the first input of the next. So each token of a document but
  the first is a target exactly once.
- The first token of a document has no predecessor in it and is no target. A document of one token is
  left out.

Pieces of equal length are interchangeable. So they are placed together, length by length, in O(pieces)
of NumPy operations and O(seq_len * log(seq_len)) of Python's. The result depends only on the documents
and ``seq_len``. This module does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ALGORITHM = "best-fit-decreasing-1"
"""Stored in the data fingerprint. Change it when the same documents give other rows."""

_BLOCK_DOCUMENTS = 1 << 22


@dataclass(frozen=True)
class Packing:
    """The rows of one split: R rows of P pieces."""

    first_piece: np.ndarray
    """uint64 [R + 1]: row ``r`` has the pieces ``first_piece[r]`` to ``first_piece[r + 1]``, exclusive."""
    starts: np.ndarray
    """uint64 [P]: the offset in the split of the first token of each piece."""
    lengths: np.ndarray
    """uint32 [P]: tokens of each piece, 2 to ``seq_len + 1``."""
    num_targets: int
    """Targets of all pieces."""

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.first_piece) - 1


def pack_documents(ends: np.ndarray, seq_len: int) -> Packing:
    """Pack the documents that end at the offsets ``ends``, uint64 [documents], not decreasing.

    Rows are in the order of their first documents, and the pieces of a row in the order of the data.
    It needs about 30 bytes of memory for each piece, beside ``ends``.
    """
    starts, lengths = cut_documents(ends, seq_len)
    row_of, num_rows = best_fit(lengths, seq_len + 1)
    row_of = _in_order(row_of, num_rows)
    first_piece = np.zeros(num_rows + 1, dtype=np.uint64)
    np.cumsum(np.bincount(row_of, minlength=num_rows), out=first_piece[1:])
    order = np.argsort(row_of, kind="stable")
    num_targets = int(lengths.sum(dtype=np.uint64)) - lengths.size
    return Packing(first_piece, starts[order], lengths[order], num_targets)


def cut_documents(ends: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ``starts``, uint64 [P], and ``lengths``, uint32 [P], of the pieces in the order of the data."""
    starts, lengths = [np.empty(0, dtype=np.uint64)], [np.empty(0, dtype=np.uint32)]
    begin = 0
    for block in range(0, ends.size, _BLOCK_DOCUMENTS):
        edges = np.concatenate([[begin], ends[block : block + _BLOCK_DOCUMENTS].astype(np.int64)])
        begin = edges[-1]
        targets = np.diff(edges) - 1
        document = np.flatnonzero(targets > 0)
        counts = -(-targets[document] // seq_len)
        document = np.repeat(document, counts)
        offsets = (np.arange(document.size) - np.repeat(np.cumsum(counts) - counts, counts)) * seq_len
        starts.append((edges[document] + offsets).astype(np.uint64))
        lengths.append((np.minimum(targets[document] - offsets, seq_len) + 1).astype(np.uint32))
    return np.concatenate(starts), np.concatenate(lengths)


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Return the row of each piece, uint32 [P], and the number of rows.

    Pieces are placed from the longest to the shortest, each into a row whose free space is the smallest
    that it fits into. ``lengths`` [P] are 1 to ``capacity``.
    """
    # NumPy sorts integers of 16 bits by radix.
    small = lengths.astype(np.uint16) if capacity < 1 << 16 else lengths
    order = np.argsort(small, kind="stable")
    counts = np.bincount(lengths, minlength=capacity + 1)
    ends = np.cumsum(counts)
    row_of = np.empty(lengths.size, dtype=np.uint32)
    rows = _OpenRows(capacity)
    for length in np.flatnonzero(counts)[::-1].tolist():
        pieces = order[ends[length] - counts[length] : ends[length]]
        while pieces.size:
            chosen, per_row = rows.take(length, pieces.size)
            row_of[pieces[: chosen.size * per_row]] = np.repeat(chosen, per_row)[: pieces.size]
            rows.put_back(chosen, length, per_row, last=pieces.size - (chosen.size - 1) * per_row)
            pieces = pieces[chosen.size * per_row :]
    return row_of, rows.count


class _OpenRows:
    """The rows by free space. They are kept in arrays of rows with equal free space.

    An array is split at most once for each length, and its rows' free space at least halves when they
    take pieces. So the number of arrays that are taken is O(seq_len * log(seq_len)).
    """

    def __init__(self, capacity: int) -> None:
        self.count = 0
        self._capacity = capacity
        self._by_space: dict[int, list[np.ndarray]] = {}
        self._spaces = 0
        """Bit ``s`` is set if there are rows with free space ``s``."""

    def take(self, length: int, num_pieces: int) -> tuple[np.ndarray, int]:
        """Return rows for up to ``num_pieces`` pieces of ``length``, and the pieces that fit into each.

        The rows are uint32 [N], with the smallest free space that is sufficient; new ones if no row
        has it. Only the last piece's row may receive fewer.
        """
        fitting = self._spaces >> length
        if not fitting:
            self._space = self._capacity
            per_row = self._capacity // length
            num_rows = -(-num_pieces // per_row)
            self.count += num_rows
            return np.arange(self.count - num_rows, self.count, dtype=np.uint32), per_row
        self._space = space = length + (fitting & -fitting).bit_length() - 1
        per_row = space // length
        num_rows = -(-num_pieces // per_row)
        arrays = self._by_space[space]
        rows = arrays.pop()
        if rows.size > num_rows:
            arrays.append(rows[num_rows:])
        elif not arrays:
            self._spaces &= ~(1 << space)
        return rows[:num_rows], per_row

    def put_back(self, rows: np.ndarray, length: int, per_row: int, *, last: int) -> None:
        """Return the taken ``rows`` with their new free space: the last one received ``last`` pieces."""
        if last >= per_row:
            self._add(rows, self._space - per_row * length)
        else:
            self._add(rows[:-1], self._space - per_row * length)
            self._add(rows[-1:], self._space - last * length)

    def _add(self, rows: np.ndarray, space: int) -> None:
        if rows.size and space:
            self._by_space.setdefault(space, []).append(rows)
            self._spaces |= 1 << space


def _in_order(row_of: np.ndarray, num_rows: int) -> np.ndarray:
    """Return ``row_of`` [P] with rows renumbered in the order in which they first occur."""
    first = np.empty(num_rows, dtype=np.int64)
    first[row_of[::-1]] = np.arange(row_of.size - 1, -1, -1)  # the last of equal indices is assigned
    number = np.empty(num_rows, dtype=np.uint32)
    number[np.argsort(first)] = np.arange(num_rows, dtype=np.uint32)
    return number[row_of]
