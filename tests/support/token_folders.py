"""Prepared folders of chosen documents, as ``kempnerforge data prepare`` writes them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import xxhash

from kempnerforge.data.index import Index, ShardEntry, SplitEntry

VOCAB_SIZE = 60_000
SEPARATOR = VOCAB_SIZE - 1


def numbered(lengths: Sequence[int]) -> list[np.ndarray]:
    """Return documents of these lengths whose tokens are numbered: each id occurs once."""
    edges = np.cumsum([0, *lengths])
    return [np.arange(start, stop) for start, stop in itertools.pairwise(edges)]


def write_folder(
    folder: Path,
    splits: Mapping[str, Sequence[np.ndarray]],
    *,
    counted: Mapping[str, np.ndarray] | None = None,
    shard_tokens: int = 1 << 20,
    has_ends: bool = True,
) -> Path:
    """Write documents of token ids, in order, into a new folder. ``counted`` has a value for each token."""
    folder.mkdir()
    index = Index(
        dtype="uint16",
        vocab_size=VOCAB_SIZE,
        separator_id=SEPARATOR,
        tokenizer="made up",
        tokenizer_digest="0" * 32,
        val_fraction=0.1,
        splits={
            name: _write_split(folder, name, documents, (counted or {}).get(name), shard_tokens, has_ends)
            for name, documents in splits.items()
        },
    )
    (folder / "index.json").write_bytes(index.to_json())
    return folder


def _write_split(
    folder: Path,
    name: str,
    documents: Sequence[np.ndarray],
    counted: np.ndarray | None,
    shard_tokens: int,
    has_ends: bool,
) -> SplitEntry:
    ids = np.concatenate(documents).astype("<u2")
    ends = np.cumsum([document.size for document in documents]).astype("<u8")
    shards = []
    for number, start in enumerate(range(0, ids.size, shard_tokens)):
        part = ids[start : start + shard_tokens]
        own_ends = ends[(ends > start) & (ends <= start + part.size)] - np.uint64(start)
        stem = folder / f"{name}_{number:05d}"
        shards.append(
            ShardEntry(
                f"{stem.name}.bin",
                part.size,
                own_ends.size,
                int(part.max()),
                _write(stem.with_suffix(".bin"), part),
                ends_digest=_write(stem.with_suffix(".ends"), own_ends) if has_ends else None,
                counted_digest=None
                if counted is None
                else _write(
                    stem.with_suffix(".counted"), counted[start : start + shard_tokens].astype(np.uint8)
                ),
            )
        )
    return SplitEntry(
        ids.size,
        len(documents),
        xxhash.xxh3_128_hexdigest(ids.tobytes()),
        tuple(shards),
    )


def _write(path: Path, array: np.ndarray) -> str:
    path.write_bytes(array.tobytes())
    return xxhash.xxh3_128_hexdigest(array.tobytes())
