"""``index.json`` of a prepared folder: the content of its token shards, and their digests.

A prepared folder::

    index.json           written last; the folder appears under its name only when it is complete
    train_00000.bin      raw little-endian uint16 or uint32 token ids
    train_00000.ends     where documents end: little-endian uint64 offsets in the shard, in tokens, after
                         the last token of each document that ends in it, its separator included
    train_00000.counted  only for fine-tuning data: one byte per token, 1 if it counts as a target, else 0
    val_00000.bin        the held-out documents
    tokenizer.json       the tokenizer and the files that belong to it, unless it is that of bytes
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from kempnerforge.errors import DataError

FORMAT = 2
READABLE_FORMATS = (1, 2)
"""Format 1 has no ``.ends`` and ``.counted`` files."""
INDEX_NAME = "index.json"
DTYPES = ("uint16", "uint32")


@dataclass(frozen=True)
class ShardEntry:
    """One ``.bin`` file."""

    file: str
    tokens: int
    documents: int
    """Documents that end in this shard."""
    max_id: int
    digest: str
    """xxh3-128 of the file, hexadecimal."""
    ends_digest: str | None = None
    """xxh3-128 of the ``.ends`` file. None in format 1."""
    counted_digest: str | None = None
    """xxh3-128 of the ``.counted`` file. None if there is none: all tokens count as targets."""


@dataclass(frozen=True)
class SplitEntry:
    """``train`` or ``val``."""

    tokens: int
    documents: int
    digest: str
    """xxh3-128 of the split's token bytes in order, hexadecimal. It does not depend on the shards."""
    shards: tuple[ShardEntry, ...]


@dataclass(frozen=True)
class Index:
    """The whole file."""

    dtype: str
    vocab_size: int
    separator_id: int
    tokenizer: str
    tokenizer_digest: str
    val_fraction: float
    num_empty: int
    """Empty files, which were skipped."""
    num_binary: int
    """Files that are not text, which were skipped."""
    num_not_utf8: int
    """Documents with invalid UTF-8, which a text tokenizer replaced by U+FFFD."""
    splits: dict[str, SplitEntry]

    @property
    def digest(self) -> str:
        """Digest of what affects every training: ids, counted tokens, splits, vocabulary and separator."""
        content = {
            "vocab_size": self.vocab_size,
            "separator_id": self.separator_id,
            "splits": {name: _split_content(split) for name, split in sorted(self.splits.items())},
        }
        return json_digest(content)

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Dtype of the ids in every shard; little-endian."""
        return np.dtype(self.dtype).newbyteorder("<")

    def to_json(self) -> bytes:
        """Return the bytes of ``index.json``."""
        content = {"format": FORMAT, **asdict(self), "digest": self.digest}
        return (json.dumps(content, indent=2) + "\n").encode()


def _split_content(split: SplitEntry) -> list[Any]:
    counted = [shard.counted_digest for shard in split.shards if shard.counted_digest is not None]
    return [split.tokens, split.digest, *([counted] if counted else [])]


def json_digest(value: Any) -> str:
    """Return the xxh3-128, hexadecimal, of ``value`` as JSON with sorted keys."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(canonical.encode())


def read_index(folder: Path) -> Index:
    """Read and check ``folder/index.json``. The shards are not read.

    Raises :class:`DataError` if it cannot be read, is of another format, or contradicts itself.
    """
    path = folder / INDEX_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path}: damaged, not JSON ({error}); prepare the data again") from error
    data_format = content.get("format") if isinstance(content, dict) else None
    if data_format not in READABLE_FORMATS:
        readable = " and ".join(map(str, READABLE_FORMATS))
        raise DataError(f"{path}: format {data_format!r}; this version reads formats {readable}")
    try:
        index = _parse_index(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: damaged ({error}); prepare the data again") from error
    if index.digest != content.get("digest"):
        raise DataError(
            f"{path}: damaged or edited by hand, its digest does not match; prepare the data again"
        )
    return index


def _parse_index(content: dict[str, Any]) -> Index:
    splits = {name: _parse_split(raw) for name, raw in content["splits"].items()}
    index = Index(**{**{field.name: content[field.name] for field in fields(Index)}, "splits": splits})
    if index.dtype not in DTYPES:
        raise ValueError(f"dtype {index.dtype!r} is not one of {', '.join(DTYPES)}")
    for name, split in splits.items():
        if split.tokens != sum(shard.tokens for shard in split.shards):
            raise ValueError(f"the shards of {name!r} do not add up to {split.tokens} tokens")
        for shard in split.shards:
            if shard.max_id >= index.vocab_size:
                raise ValueError(f"{shard.file} holds id {shard.max_id}, vocabulary {index.vocab_size}")
    return index


def _parse_split(raw: dict[str, Any]) -> SplitEntry:
    shards = tuple(ShardEntry(**entry) for entry in raw["shards"])
    for shard in shards:
        if Path(shard.file).name != shard.file:
            raise ValueError(f"{shard.file!r} is not a plain file name")
    return SplitEntry(**{**raw, "shards": shards})
