"""Write the ``.bin`` token shards of one split."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from kempnerforge.data.index import ShardEntry, SplitEntry
from kempnerforge.fsio import open_file, write_all


class ShardWriter:
    """Appends token ids to ``{split}_00000.bin``, ``{split}_00001.bin``, ... of ``shard_tokens`` each.

    Every shard is fsynced when it is complete. Its entry in the folder is not durable yet.
    """

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self._folder = folder
        self._split = split
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._entries: list[ShardEntry] = []
        self._digest = xxhash.xxh3_128()
        self._fd = -1

    def write(self, ids: np.ndarray) -> None:
        """Append ``ids``, integers [num_tokens]. Begin another shard when one is full."""
        ids = ids.astype(self._dtype, copy=False)
        while ids.size:
            # A full shard is closed only when there is more to write, so that a document that fills
            # it is still counted in it.
            if self._fd >= 0 and self._tokens == self._shard_tokens:
                self._close_shard()
            if self._fd < 0:
                self._open_shard()
            part = ids[: self._shard_tokens - self._tokens]
            data = np.ascontiguousarray(part).data.cast("B")
            write_all(self._fd, data)
            self._digest.update(data)
            self._shard_digest.update(data)
            self._max_id = max(self._max_id, int(part.max()))
            self._tokens += part.size
            ids = ids[part.size :]

    def end_document(self) -> None:
        """Count a document that ended with the last written id."""
        self._documents += 1

    def close(self) -> SplitEntry:
        """Complete the last shard and return the entry of the split."""
        if self._fd >= 0:
            self._close_shard()
        return SplitEntry(
            tokens=sum(entry.tokens for entry in self._entries),
            documents=sum(entry.documents for entry in self._entries),
            digest=self._digest.hexdigest(),
            shards=tuple(self._entries),
        )

    def abandon(self) -> None:
        """Close the file after an error. What was written is discarded by the caller."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open_shard(self) -> None:
        self._name = f"{self._split}_{len(self._entries):05d}.bin"
        self._fd = open_file(self._folder / self._name, os.O_WRONLY | os.O_EXCL)
        self._shard_digest = xxhash.xxh3_128()
        self._tokens = self._documents = self._max_id = 0

    def _close_shard(self) -> None:
        os.fsync(self._fd)
        os.close(self._fd)
        self._fd = -1
        digest = self._shard_digest.hexdigest()
        self._entries.append(ShardEntry(self._name, self._tokens, self._documents, self._max_id, digest))
