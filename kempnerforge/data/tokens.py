"""Memory-mapped training data: a folder of ``kempnerforge data prepare``, or plain ``.npy`` token shards.

This module does not import torch. It checks the data when they are opened, before training.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from kempnerforge.config.data import DataConfig, PackingMethod
from kempnerforge.config.path_text import expand
from kempnerforge.data.index import INDEX_NAME, Index, ShardEntry, json_digest, read_index
from kempnerforge.data.packing import ALGORITHM
from kempnerforge.data.packing_file import PackingFile
from kempnerforge.data.samples import PackedSamples, Samples, TokenStream
from kempnerforge.data.shard_reader import ArrayFile, TokenShard, content_digest, open_npy
from kempnerforge.errors import DataError

VERIFY_BYTES = 4 << 30
"""Data up to this size are read whole and checked whenever they are opened, which takes seconds.
Larger data are checked on request."""

SAMPLED_BLOCKS = 256
SAMPLED_BLOCK_TOKENS = 16 << 10
"""The digest of ``.npy`` data above VERIFY_BYTES covers this many blocks of every shard."""

_VAL_NAME = re.compile(r"(^|[^a-z])(e?val|valid|validation)([^a-z]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class RowOptions:
    """How samples are made of documents."""

    document_mask: bool = False
    """Whether rows have the numbers of their documents."""
    packing: PackingMethod = "contiguous"
    """As data.packing."""
    cache_dir: Path | None = None
    """Folder for packings. "best_fit" needs it."""

    @classmethod
    def of(cls, data: DataConfig) -> RowOptions:
        """Return the options of a config."""
        packed = data.packing != "contiguous"
        return cls(data.document_mask, data.packing, data.cache_folder if packed else None)

    @property
    def document_key(self) -> str | None:
        """The key of the config that needs to know where documents end. None if none does."""
        if self.packing != "contiguous":
            return f'data.packing = "{self.packing}"'
        return "data.document_mask = true" if self.document_mask else None


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
        self.rows = RowOptions()
        self.makes_packing = True
        """Whether ``split`` makes a packing that is not stored. False if another rank does."""
        self._val_fraction = val_fraction

    @property
    def vocab_size(self) -> int | None:
        """Vocabulary size of the tokenizer of the data; None for ``.npy`` shards, which do not record it."""
        return self.index.vocab_size if self.index else None

    @property
    def size_bytes(self) -> int:
        """Total size of all files of all splits."""
        return sum(
            file.size_bytes for shards in self.shards.values() for shard in shards for file in shard.files
        )

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
        """Return what is wrong with each bad shard, by path: a size or, with ``contents``, its content."""
        found: dict[Path, str] = {}
        for shards in self.shards.values():
            for shard in shards:
                if problem := shard.problem(contents=contents, vocab_size=self._id_limit):
                    found[shard.path] = problem
        return found

    def split(self, name: str, seq_len: int) -> Samples:
        """Return the samples of ``"train"`` or ``"val"``, with ``seq_len`` inputs each.

        The packing "best_fit" is computed at the first use and stored. With ``verify=False`` in
        ``open_dataset`` it must be stored already.

        Raises :class:`DataError` if there is no such split, it has less than one sample, or it is not
        known where its documents end although ``rows`` needs it.
        """
        stream = self._stream(name)
        if self.rows.packing == "contiguous":
            first, count = self._contiguous(name, seq_len)
            mask = self.rows.document_mask
            return Samples(stream, seq_len, first_sample=first, num_samples=count, document_mask=mask)
        file = self._packing_file(name, seq_len)
        packing = file.open_or_make(stream.document_ends, seq_len) if self.makes_packing else file.open()
        if packing.num_rows == 0:
            raise DataError(f"{self.path}: no document of the {name} split has two tokens")
        return PackedSamples(stream, seq_len, packing, document_mask=self.rows.document_mask)

    def check_split(self, name: str, seq_len: int) -> None:
        """Raise what ``split`` raises, as far as that is known without reading tokens."""
        self._shards_of(name)
        if self.rows.packing == "contiguous":
            self._contiguous(name, seq_len)

    def rows_fingerprint(self, split: str) -> dict[str, Any]:
        """Return what determines the tokens of the rows of ``split``, as JSON values. A mask does not."""
        if self.rows.packing == "contiguous":
            return {}
        packing = {"packing": f"{self.rows.packing} ({ALGORITHM})"}
        documents = self._stream(split).documents_digest()
        return packing if documents is None else {**packing, "documents": documents}

    def _stream(self, name: str) -> TokenStream:
        separator_id = self.index.separator_id if self.index else None
        return TokenStream(self._shards_of(name), vocab_size=self._id_limit, separator_id=separator_id)

    def _shards_of(self, name: str) -> tuple[TokenShard, ...]:
        source = "train" if name == "val" and self._holds_out else name
        if source not in self.shards:
            raise DataError(
                f"{self.path} has no {name} split. Prepare it with a larger --val-fraction, "
                "or set eval.interval = 0"
            )
        if self.rows.document_key is not None and self.index is None:
            raise DataError(
                f"{self.path}: .npy shards do not record where documents end, which "
                f"{self.rows.document_key} needs. Remove this key, or prepare the text: "
                "kempnerforge data prepare FILES --out DIR"
            )
        return self.shards[source]

    def _contiguous(self, name: str, seq_len: int) -> tuple[int, int]:
        """Return the first contiguous sample of a split, and their number."""
        num_tokens = sum(shard.num_tokens for shard in self._shards_of(name))
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
        return first, count

    def _packing_file(self, name: str, seq_len: int) -> PackingFile:
        assert self.rows.cache_dir is not None
        ends = [shard.ends.digest if shard.ends is not None else None for shard in self.shards[name]]
        return PackingFile.of(
            self.rows.cache_dir, dataset=self.digest, ends=ends, split=name, seq_len=seq_len
        )


def open_dataset(
    path: str | Path,
    *,
    vocab_size: int | None = None,
    val_fraction: float = 0.01,
    verify: bool | None = None,
    rows: RowOptions | None = None,
) -> TokenDataset:
    """Open a prepared folder, a folder of ``.npy`` token shards, or one ``.npy`` file, and check it.

    ``.npy`` shards are one-dimensional arrays of uint16, uint32, int32 or int64 in one folder, in
    the order of their names. Those with ``val`` as a word of the name are the validation split.
    Without any, the last ``val_fraction`` of the samples is the validation split. A prepared folder
    has its own.

    Sizes are always checked. ``verify`` says whether all tokens are also read and checked (digests,
    or ids for ``.npy``): True, False (another rank does it), or None, which is True up to
    VERIFY_BYTES. Reading an id outside the vocabulary always raises. ``vocab_size`` is that of the
    model. ``rows`` says how samples are made of documents.

    Raises :class:`DataError` if the data are missing, empty, cut short, damaged, of a wrong dtype,
    or have ids outside ``vocab_size``.
    """
    dataset = load_shards(path, vocab_size=vocab_size, val_fraction=val_fraction, rows=rows)
    dataset.makes_packing = verify is not False
    problems = dataset.problems(contents=dataset.size_bytes <= VERIFY_BYTES if verify is None else verify)
    if problems:
        first, *others = problems.values()
        more = f" (and {len(others)} more shards)" if others else ""
        remedy = f"\nTo repair: delete {dataset.path} and prepare the text again" if dataset.index else ""
        raise DataError(f"{first}{more}. See: kempnerforge data inspect {dataset.path}{remedy}")
    return dataset


def load_shards(
    path: str | Path,
    *,
    vocab_size: int | None = None,
    val_fraction: float = 0.01,
    rows: RowOptions | None = None,
) -> TokenDataset:
    """Open data as :func:`open_dataset` does, but check only the index or the headers."""
    folder = expand(str(path), key="data.dataset_path")
    if not folder.exists():
        raise DataError(
            f"data {folder}: no such file or folder. "
            f"Create it: kempnerforge data prepare FILES --out {folder}"
        )
    if (folder / INDEX_NAME).is_file():
        dataset = _open_prepared(folder, vocab_size)
    else:
        dataset = _open_npy_shards(folder, vocab_size, val_fraction)
    dataset.rows = rows or RowOptions()
    return dataset


def _open_prepared(folder: Path, vocab_size: int | None) -> TokenDataset:
    index = read_index(folder)
    if vocab_size is not None and index.vocab_size > vocab_size:
        raise DataError(
            f"{folder}: its tokenizer {index.tokenizer} has {index.vocab_size:,} ids, "
            f"but model.vocab_size = {vocab_size:,}; set it to {index.vocab_size} or more"
        )
    shards = {
        name: tuple(_prepared_shard(folder, index, entry) for entry in split.shards)
        for name, split in index.splits.items()
    }
    return TokenDataset(folder, shards, index=index, id_limit=index.vocab_size, val_fraction=0.0)


def _prepared_shard(folder: Path, index: Index, entry: ShardEntry) -> TokenShard:
    path = folder / entry.file
    ends = counted = None
    if entry.ends_digest is not None:
        ends = ArrayFile(
            path.with_suffix(".ends"), np.dtype("<u8"), entry.documents, digest=entry.ends_digest
        )
    if entry.counted_digest is not None:
        counted = ArrayFile(
            path.with_suffix(".counted"), np.dtype("u1"), entry.tokens, digest=entry.counted_digest
        )
    return TokenShard(path, index.numpy_dtype, entry.tokens, digest=entry.digest, ends=ends, counted=counted)


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
