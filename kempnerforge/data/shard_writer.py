"""Write the token shards of one split, and the files that belong to them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from kempnerforge.data.index import ENDS_DTYPE, ShardEntry, SplitEntry
from kempnerforge.fsio import open_file, write_all

_NO_ENDS = np.zeros(0, dtype=np.int64)


class ShardWriter:
    """Appends token ids to ``{split}_00000.bin``, ``{split}_00001.bin``, ... of ``shard_tokens`` each.

    Every file is fsynced when it is complete. Its entry in the folder is not durable yet.
    """

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self._folder = folder
        self._split = split
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._entries: list[ShardEntry] = []
        self._tokens = 0
        self._num_counted: int | None = None
        self._digest, self._ends_digest, self._counted_digest = (xxhash.xxh3_128() for _ in range(3))
        self._open: _Shard | None = None

    def write(self, ids: np.ndarray, ends: np.ndarray = _NO_ENDS, counted: np.ndarray | None = None) -> None:
        """Append ``ids``, integers [num_tokens]. Begin another shard when one is full.

        ``ends`` are the offsets in ``ids`` after the last token of each document that ends in it,
        increasing. ``counted``, bool [num_tokens], says which tokens count as targets; None: all.
        Give it always or never.
        """
        ids = ids.astype(self._dtype, copy=False)
        done = 0
        while done < ids.size:
            # A full shard is closed only when there is more to write, so that a document that fills
            # it still ends in it.
            if self._open is not None and self._open.tokens == self._shard_tokens:
                self._close_shard()
            if self._open is None:
                name = f"{self._split}_{len(self._entries):05d}.bin"
                self._open = _Shard(self._folder / name, with_counted=counted is not None)
            stop = done + min(ids.size - done, self._shard_tokens - self._open.tokens)
            here = ends[(ends > done) & (ends <= stop)] - done
            self._digest.update(np.ascontiguousarray(ids[done:stop]).data.cast("B"))
            self._open.write(ids[done:stop], here, None if counted is None else counted[done:stop])
            done = stop
        self._ends_digest.update((ends + self._tokens).astype(ENDS_DTYPE).tobytes())
        if counted is not None:
            self._counted_digest.update(counted.astype(np.uint8).tobytes())
            self._num_counted = (self._num_counted or 0) + int(np.count_nonzero(counted))
        self._tokens += ids.size

    def close(self, *, text_bytes: int | None = None) -> SplitEntry:
        """Complete the last shard and return the entry of the split."""
        if self._open is not None:
            self._close_shard()
        return SplitEntry(
            tokens=sum(entry.tokens for entry in self._entries),
            documents=sum(entry.documents for entry in self._entries),
            digest=self._digest.hexdigest(),
            shards=tuple(self._entries),
            ends_digest=self._ends_digest.hexdigest(),
            counted_digest=None if self._num_counted is None else self._counted_digest.hexdigest(),
            counted=self._num_counted,
            text_bytes=text_bytes,
        )

    def abandon(self) -> None:
        """Close the files after an error. What was written is discarded by the caller."""
        if self._open is not None:
            self._open.abandon()
            self._open = None

    def _close_shard(self) -> None:
        assert self._open is not None
        self._entries.append(self._open.close())
        self._open = None


class _Shard:
    """The files of one shard."""

    def __init__(self, path: Path, *, with_counted: bool) -> None:
        self.tokens = 0
        self._name = path.name
        self._documents = self._max_id = 0
        self._ids = _HashedFile(path)
        self._ends = _HashedFile(path.with_suffix(".ends"))
        self._counted = _HashedFile(path.with_suffix(".counted")) if with_counted else None

    def write(self, ids: np.ndarray, ends: np.ndarray, counted: np.ndarray | None) -> None:
        if (counted is None) != (self._counted is None):
            raise ValueError("the tokens that count must be given for all tokens or for none")
        self._ids.write(ids)
        self._ends.write((ends + self.tokens).astype(ENDS_DTYPE))
        if counted is not None and self._counted is not None:
            self._counted.write(counted.astype(np.uint8))
        self._max_id = max(self._max_id, int(ids.max()))
        self._documents += ends.size
        self.tokens += ids.size

    def close(self) -> ShardEntry:
        return ShardEntry(
            file=self._name,
            tokens=self.tokens,
            documents=self._documents,
            max_id=self._max_id,
            digest=self._ids.close(),
            ends_digest=self._ends.close(),
            counted_digest=None if self._counted is None else self._counted.close(),
        )

    def abandon(self) -> None:
        for file in (self._ids, self._ends, self._counted):
            if file is not None:
                file.abandon()


class _HashedFile:
    """A new file, written once, with the digest of its content."""

    def __init__(self, path: Path) -> None:
        self._fd = open_file(path, os.O_WRONLY | os.O_EXCL)
        self._digest = xxhash.xxh3_128()

    def write(self, values: np.ndarray) -> None:
        if values.size:
            data = np.ascontiguousarray(values).data.cast("B")
            write_all(self._fd, data)
            self._digest.update(data)

    def close(self) -> str:
        """Make the content durable and return its digest."""
        os.fsync(self._fd)
        self.abandon()
        return self._digest.hexdigest()

    def abandon(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
