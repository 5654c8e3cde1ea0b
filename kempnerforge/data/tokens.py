"""Memory-mapped training data: a folder of ``kempnerforge data prepare``, or plain ``.npy`` token shards.

This module does not import torch. It checks the data when they are opened, before training.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import numpy as np
import xxhash

from kempnerforge.config.path_text import expand
from kempnerforge.data.index import INDEX_NAME, Index, json_digest, read_index
from kempnerforge.data.rows import Rows
from kempnerforge.data.shard_reader import TokenShard, content_digest, ids_problem, open_npy
from kempnerforge.errors import DataError

VERIFY_BYTES = 4 << 30
"""Data up to this size are read whole and checked whenever they are opened, which takes seconds.
Larger data are checked on request."""

SAMPLED_BLOCKS = 256
SAMPLED_BLOCK_TOKENS = 16 << 10
"""The digest of ``.npy`` data above VERIFY_BYTES covers this many blocks of every shard."""

MAX_OPEN_SHARDS = 256
"""A mapped file holds a file descriptor, and the usual limit is 1,024."""

_VAL_NAME = re.compile(r"(^|[^a-z])(e?val|valid|validation)([^a-z]|$)", re.IGNORECASE)


class Samples:
    """The samples of one split: sample ``i`` is tokens ``i * seq_len`` to ``(i + 1) * seq_len``, inclusive.

    Neighbours share one token: the last target of one sample is the first input of the next.
    """

    def __init__(
        self,
        shards: tuple[TokenShard, ...],
        seq_len: int,
        *,
        first_sample: int,
        num_samples: int,
        vocab_size: int | None,
    ) -> None:
        self.seq_len = seq_len
        self.num_samples = num_samples
        self._shards = shards
        self._first_sample = first_sample
        self._vocab_size = vocab_size
        self._starts = np.cumsum([0, *(shard.num_tokens for shard in shards)])
        self._map = functools.lru_cache(maxsize=MAX_OPEN_SHARDS)(lambda number: shards[number].map())

    def read(self, ids: np.ndarray) -> Rows:
        """Return samples ``ids`` [N]. They may span shards.

        Raises IndexError for a sample that does not exist, and :class:`DataError` for a token id
        outside the vocabulary.
        """
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.num_samples:
            raise IndexError(f"{ids.min()} to {ids.max()} are not in samples 0 to {self.num_samples - 1}")
        rows = np.empty((ids.size, self.seq_len + 1), dtype=np.int64)
        for row, sample in zip(rows, ids + self._first_sample, strict=True):
            self._read_row(row, int(sample) * self.seq_len)
        if rows.size:
            problem = ids_problem(int(rows.min()), int(rows.max()), self._vocab_size)
            if problem is not None:
                raise DataError(f"{self._shards[0].path.parent}: {problem}")
        return Rows(rows)

    def _read_row(self, row: np.ndarray, start: int) -> None:
        """Fill ``row`` [seq_len + 1] with the tokens of the split from ``start`` on."""
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        done = 0
        while done < row.size:
            offset = start + done - int(self._starts[number])
            part = self._map(number)[offset : offset + row.size - done]
            row[done : done + part.size] = part
            done += part.size
            number += 1


class TokenDataset:
    """Token shards by split. Use :func:`open_dataset` to create it."""

    has_tokens = True
    """As ``MapDataset.has_tokens``."""

    def __init__(
        self,
        path: Path,
        shards: dict[str, tuple[TokenShard, ...]],
        *,
        index: Index | None,
        id_limit: int | None,
        val_fraction: float,
    ) -> None:
        self.path = path
        self.shards = shards
        self.index = index
        """The content of ``index.json``; None for ``.npy`` shards."""
        self._id_limit = id_limit
        self._val_fraction = val_fraction

    @property
    def vocab_size(self) -> int | None:
        """Vocabulary size of the tokenizer of the data; None for ``.npy`` shards, which do not record it."""
        return self.index.vocab_size if self.index else None

    @property
    def size_bytes(self) -> int:
        """Total size of all files of all splits."""
        return sum(shard.size_bytes for shards in self.shards.values() for shard in shards)

    @functools.cached_property
    def digest(self) -> str:
        """A digest of the content, whatever its path. For ``.npy`` shards it is computed at the first use.

        For ``.npy`` data of more than VERIFY_BYTES it covers only evenly spaced blocks: enough to
        distinguish data sets, but not to find a flipped byte.
        """
        if self.index:
            return self.index.digest
        whole = self.size_bytes <= VERIFY_BYTES
        return json_digest(
            {
                name: [
                    [shard.num_tokens, content_digest(shard) if whole else _sampled_digest(shard)]
                    for shard in shards
                ]
                for name, shards in sorted(self.shards.items())
            }
            | {"held out": self._val_fraction if self._holds_out else None}
        )

    @property
    def _holds_out(self) -> bool:
        """Whether the end of ``train`` serves as ``val``."""
        return self.index is None and "val" not in self.shards and self._val_fraction > 0

    def problems(self, *, contents: bool) -> dict[Path, str]:
        """Return what is wrong with each bad shard, by path: its size or, with ``contents``, its ids."""
        found: dict[Path, str] = {}
        for shards in self.shards.values():
            for shard in shards:
                problem = shard.size_problem()
                if problem is None and contents:
                    problem = shard.content_problem(self._id_limit)
                if problem is not None:
                    found[shard.path] = problem
        return found

    def split(self, name: str, seq_len: int) -> Samples:
        """Return the samples of ``"train"`` or ``"val"``, with ``seq_len`` inputs each.

        Raises :class:`DataError` if there is no such split or it has less than one sample.
        """
        source = "train" if name == "val" and self._holds_out else name
        if source not in self.shards:
            raise DataError(
                f"{self.path} has no {name} split. Prepare it with a larger --val-fraction, "
                "or set eval.interval = 0"
            )
        shards = self.shards[source]
        num_tokens = sum(shard.num_tokens for shard in shards)
        first, count = 0, max(0, (num_tokens - 1) // seq_len)
        if self._holds_out:
            num_val = max(1, round(count * self._val_fraction))
            first, count = (count - num_val, num_val) if name == "val" else (0, count - num_val)
        if count < 1 or first < 0:
            held_out = f", {self._val_fraction:.2%} of them held out" if self._holds_out else ""
            raise DataError(
                f"{self.path}: too few tokens for one {name} sample: {num_tokens:,}{held_out}; "
                f"train.seq_len = {seq_len} needs {seq_len + 1:,}"
            )
        return Samples(shards, seq_len, first_sample=first, num_samples=count, vocab_size=self._id_limit)


def open_dataset(
    path: str | Path,
    *,
    vocab_size: int | None = None,
    val_fraction: float = 0.01,
    verify: bool | None = None,
) -> TokenDataset:
    """Open a prepared folder, a folder of ``.npy`` token shards, or one ``.npy`` file, and check it.

    ``.npy`` shards are one-dimensional arrays of uint16, uint32, int32 or int64 in one folder, in
    the order of their names. Those with ``val`` as a word of the name are the validation split.
    Without any, the last ``val_fraction`` of the samples is the validation split. A prepared folder
    has its own.

    Sizes are always checked. ``verify`` says whether all tokens are also read and checked (digests,
    or ids for ``.npy``): True, False (another rank does it), or None, which is True up to
    VERIFY_BYTES. Reading an id outside the vocabulary always raises. ``vocab_size`` is that of the
    model.

    Raises :class:`DataError` if the data are missing, empty, cut short, damaged, of a wrong dtype,
    or have ids outside ``vocab_size``.
    """
    dataset = load_shards(path, vocab_size=vocab_size, val_fraction=val_fraction)
    problems = dataset.problems(contents=dataset.size_bytes <= VERIFY_BYTES if verify is None else verify)
    if problems:
        first, *others = problems.values()
        more = f" (and {len(others)} more shards)" if others else ""
        remedy = f"\nTo repair: delete {dataset.path} and prepare the text again" if dataset.index else ""
        raise DataError(f"{first}{more}. See: kempnerforge data inspect {dataset.path}{remedy}")
    return dataset


def load_shards(
    path: str | Path, *, vocab_size: int | None = None, val_fraction: float = 0.01
) -> TokenDataset:
    """Open data as :func:`open_dataset` does, but check only the index or the headers."""
    folder = expand(str(path), key="data.dataset_path")
    if not folder.exists():
        raise DataError(
            f"data {folder}: no such file or folder. "
            f"Create it: kempnerforge data prepare FILES --out {folder}"
        )
    if (folder / INDEX_NAME).is_file():
        return _open_prepared(folder, vocab_size)
    return _open_npy_shards(folder, vocab_size, val_fraction)


def _open_prepared(folder: Path, vocab_size: int | None) -> TokenDataset:
    index = read_index(folder)
    if vocab_size is not None and index.vocab_size > vocab_size:
        raise DataError(
            f"{folder}: its tokenizer {index.tokenizer} has {index.vocab_size:,} ids, "
            f"but model.vocab_size = {vocab_size:,}; set it to {index.vocab_size} or more"
        )
    shards = {
        name: tuple(
            TokenShard(folder / entry.file, index.numpy_dtype, entry.tokens, digest=entry.digest)
            for entry in split.shards
        )
        for name, split in index.splits.items()
    }
    return TokenDataset(folder, shards, index=index, id_limit=index.vocab_size, val_fraction=0.0)


def _open_npy_shards(path: Path, vocab_size: int | None, val_fraction: float) -> TokenDataset:
    if path.is_file() and path.suffix != ".npy":
        raise DataError(
            f"data {path}: a single file must be .npy. For text: kempnerforge data prepare {path}"
        )
    files = [path] if path.is_file() else sorted(path.glob("*.npy"))
    if not files:
        raise DataError(
            f"data {path}: has neither {INDEX_NAME} nor .npy files. "
            f"Prepare a folder: kempnerforge data prepare FILES --out DIR"
        )
    shards: dict[str, tuple[TokenShard, ...]] = {}
    for file in files:
        split = "val" if len(files) > 1 and _VAL_NAME.search(file.stem) else "train"
        shards[split] = (*shards.get(split, ()), open_npy(file))
    if "train" not in shards:
        raise DataError(
            f"data {path}: all .npy files are validation shards by their names; none is for training"
        )
    return TokenDataset(path, shards, index=None, id_limit=vocab_size, val_fraction=val_fraction)


def _sampled_digest(shard: TokenShard) -> str:
    ids = shard.map()
    starts = np.linspace(0, max(0, ids.size - SAMPLED_BLOCK_TOKENS), SAMPLED_BLOCKS).astype(np.int64)
    digest = xxhash.xxh3_128()
    for start in starts:
        digest.update(np.ascontiguousarray(ids[start : start + SAMPLED_BLOCK_TOKENS]).data.cast("B"))
    return digest.hexdigest()
