"""The memory-mapped files of a token shard: a plain ``.npy``, or the files of a prepared folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from kempnerforge.errors import DataError

NPY_DTYPES = ("uint16", "uint32", "int32", "int64")
SCAN_TOKENS = 1 << 24


@dataclass(frozen=True)
class ArrayFile:
    """A one-dimensional array in a file."""

    path: Path
    dtype: np.dtype[Any]
    length: int
    """Number of elements."""
    offset_bytes: int = 0
    """Where in the file the array begins."""
    digest: str | None = None
    """Expected xxh3-128 of the array, hexadecimal. None when none was recorded."""

    @property
    def size_bytes(self) -> int:
        """Expected size of the whole file."""
        return self.offset_bytes + self.length * self.dtype.itemsize

    def map(self) -> np.ndarray:
        """Return the array [length] as a read-only memory map."""
        if self.length == 0:  # an empty file cannot be mapped
            return np.empty(0, dtype=self.dtype)
        mapped = np.memmap(
            self.path, dtype=self.dtype, mode="r", offset=self.offset_bytes, shape=(self.length,)
        )
        return mapped.view(np.ndarray)  # of which slices are taken much faster

    def size_problem(self) -> str | None:
        """Return what is wrong with the file's size, or None."""
        try:
            actual_bytes = self.path.stat().st_size
        except OSError as error:
            return f"{self.path}: {error.strerror}"
        if actual_bytes < self.size_bytes:
            return f"{self.path}: cut short, {actual_bytes:,} of {self.size_bytes:,} bytes"
        if actual_bytes > self.size_bytes:
            return f"{self.path}: too long, {actual_bytes:,} bytes instead of {self.size_bytes:,}"
        return None

    def digest_problem(self) -> str | None:
        """Read the array and return what is wrong with its digest, or None. The size must be right."""
        matches = self.digest is None or content_digest(self) == self.digest
        return None if matches else f"{self.path}: damaged, its digest does not match the index"


@dataclass(frozen=True)
class TokenShard(ArrayFile):
    """A file of token ids, and the files beside it that describe the tokens."""

    ends: ArrayFile | None = None
    """uint64 [documents that end in the shard]: the offset in the shard after each of them. None in
    format 1 and for ``.npy``."""
    counted: ArrayFile | None = None
    """uint8 [num_tokens]: whether each token counts as a target. None if all do."""

    @property
    def num_tokens(self) -> int:
        """Number of token ids."""
        return self.length

    @property
    def files(self) -> tuple[ArrayFile, ...]:
        """All files of the shard."""
        return (self, *(file for file in (self.ends, self.counted) if file is not None))

    def problem(self, *, contents: bool, vocab_size: int | None) -> str | None:
        """Return what is wrong with a size or, with ``contents``, with the content of a file, or None."""
        for file in self.files:
            if problem := file.size_problem() or (file.digest_problem() if contents else None):
                return problem
        return self._ids_problem(vocab_size) if contents and self.digest is None else None

    def _ids_problem(self, vocab_size: int | None) -> str | None:
        ids = self.map()
        for start in range(0, self.num_tokens, SCAN_TOKENS):
            block = ids[start : start + SCAN_TOKENS]
            problem = ids_problem(int(block.min()), int(block.max()), vocab_size)
            if problem is not None:
                return f"{self.path}: {problem}"
        return None


def ids_problem(lowest: int, highest: int, vocab_size: int | None) -> str | None:
    """Return what is wrong with ids between ``lowest`` and ``highest``, or None."""
    if lowest < 0:
        return f"holds the negative token id {lowest}"
    if vocab_size is not None and highest >= vocab_size:
        return f"holds token id {highest}, but the vocabulary has {vocab_size} ids (model.vocab_size)"
    return None


def content_digest(file: ArrayFile) -> str:
    """Return the xxh3-128, hexadecimal, of the bytes of the array."""
    return xxhash.xxh3_128_hexdigest(file.map().data.cast("B"))


def open_npy(path: Path) -> TokenShard:
    """Read the header of a ``.npy`` file of token ids. Nothing is unpickled.

    Raises :class:`DataError` if it is not a one-dimensional array of a token dtype, is empty or is
    cut short.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError) as error:
        raise DataError(f"{path}: cut short, or not a .npy array: {error}") from error
    if not isinstance(array, np.memmap) or array.ndim != 1:
        shape = getattr(array, "shape", "none")
        raise DataError(f"{path}: token shards are one-dimensional arrays; this one has shape {shape}")
    if array.dtype.name not in NPY_DTYPES:
        raise DataError(f"{path}: dtype {array.dtype}; token ids are {', '.join(NPY_DTYPES)}")
    if array.size == 0:
        raise DataError(f"{path}: holds no tokens")
    return TokenShard(path, array.dtype, array.size, offset_bytes=array.offset)
