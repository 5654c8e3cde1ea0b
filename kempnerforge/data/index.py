"""``index.json`` of a prepared folder: the content of its token shards, and their digests.

A prepared folder::

    index.json           written last; the folder appears under its name only when it is complete
    train_00000.bin      raw little-endian uint16 or uint32 token ids
    train_00000.ends     little-endian uint64 [documents]: for each document that ends in the shard,
                         the offset in the shard after its last token, the separator included
    train_00000.counted  only for fine-tuning data: uint8 [tokens], 1 where the token counts in the
                         loss as a target
    val_00000.bin        the held-out documents; with the same files as train
    tokenizer.json       the tokenizer and the files that belong to it, unless it is that of bytes

Folders of format 1 have neither ``.ends`` nor ``.counted`` files. They are still read.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from kempnerforge.errors import DataError

FORMAT = 2
READABLE_FORMATS = (1, 2)
INDEX_NAME = "index.json"
DTYPES = ("uint16", "uint32")
ENDS_DTYPE = np.dtype("<u8")

_DETAILS = re.compile(r"[;:(]| as ")
_NUMBER = re.compile(r"0x[0-9a-f]+|\d[\d,]*")

NAMED_LEFT_OUT = 20
"""So many of the files and records that were left out are named."""


@dataclass(frozen=True)
class ShardEntry:
    """One ``.bin`` file, and the files that belong to it."""

    file: str
    tokens: int
    documents: int
    """Documents that end in this shard."""
    max_id: int
    digest: str
    """xxh3-128 of the file, hexadecimal."""
    ends_digest: str | None = None
    """xxh3-128 of the ``.ends`` file. None in format 1, which has no such file."""
    counted_digest: str | None = None
    """xxh3-128 of the ``.counted`` file. None if all tokens count."""

    @property
    def ends_file(self) -> str:
        """Name of the file with the ends of the documents."""
        return Path(self.file).with_suffix(".ends").name

    @property
    def counted_file(self) -> str:
        """Name of the file that says which tokens count."""
        return Path(self.file).with_suffix(".counted").name


@dataclass(frozen=True)
class SplitEntry:
    """``train`` or ``val``."""

    tokens: int
    documents: int
    digest: str
    """xxh3-128 of the split's token bytes in order, hexadecimal. It does not depend on the shards."""
    shards: tuple[ShardEntry, ...]
    ends_digest: str | None = None
    """xxh3-128 of the offsets in the split after each document, little-endian uint64. It does not depend
    on the shards. None in format 1."""
    counted_digest: str | None = None
    """xxh3-128 of the ``.counted`` bytes of the split in order. None if there are none."""
    counted: int | None = None
    """Tokens that count as targets. None: all."""
    text_bytes: int | None = None
    """Bytes of text, as UTF-8. None in format 1, which does not record it."""


@dataclass(frozen=True)
class LeftOut:
    """Files, documents and records that were not tokenized."""

    counts: Mapping[str, int] = field(default_factory=dict)
    """Kind of reason (``kind_of``) -> number."""
    first: tuple[tuple[str, str], ...] = ()
    """(file or file:line, reason) of the first ``NAMED_LEFT_OUT``."""

    @classmethod
    def of(cls, items: Iterable[tuple[str, str]]) -> LeftOut:
        """Count ``items``, each (file or file:line, reason)."""
        counts: Counter[str] = Counter()
        first: list[tuple[str, str]] = []
        for where, reason in items:
            counts[kind_of(reason)] += 1
            if len(first) < NAMED_LEFT_OUT:
                first.append((where, reason))
        return cls(dict(counts), tuple(first))

    @property
    def total(self) -> int:
        """Number of all items."""
        return sum(self.counts.values())

    def lines(self) -> list[str]:
        """Return one line for each reason, followed by the first names."""
        lines = [f"left out: {count:,} x {reason}" for reason, count in self.counts.items()]
        lines += [f"  {where}: {reason}" for where, reason in self.first]
        more = self.total - len(self.first)
        return [*lines, f"  and {more:,} more"] if self.first and more > 0 else lines


def kind_of(reason: str) -> str:
    """Return ``reason`` without what is particular to one file or record: numbers, names and details."""
    return _NUMBER.sub("N", _DETAILS.split(reason)[0]).strip()


@dataclass(frozen=True)
class TextSettings:
    """How the text was read, and which special tokens are written. Empty for format 1."""

    eos_token: str | None = None
    """Text of the token that ends each document, whose id is ``separator_id``."""
    eos_source: str | None = None
    """What named it: a file, an option, or the list of well-known tokens."""
    bos_token: str | None = None
    """Text of the token that begins each document."""
    bos_id: int | None = None
    unwritten_bos: str | None = None
    """The ``bos_token`` of the tokenizer's files, if it is not written."""
    format: str = "text"
    """What the files have, as data.format."""
    notes: tuple[str, ...] = ()
    """How the tokens were made."""
    text_field: str | None = None
    document_separator: str | None = None
    skip_unreadable: bool = False
    warnings: tuple[str, ...] = ()
    """What may not be as intended."""


@dataclass(frozen=True)
class Index:
    """The whole file."""

    dtype: str
    vocab_size: int
    separator_id: int
    tokenizer: str
    tokenizer_digest: str
    val_fraction: float
    splits: dict[str, SplitEntry]
    passed_over: LeftOut = field(default_factory=LeftOut)
    """Files that are not text or have none."""
    unreadable: LeftOut = field(default_factory=LeftOut)
    """Documents, records and rests of files that could not be read."""
    text: TextSettings = field(default_factory=TextSettings)

    @property
    def digest(self) -> str:
        """Digest of what affects every training: ids, counted tokens, splits, vocabulary and separator.

        Format 2 has the same digest as format 1 for the same tokens.
        """
        content: dict[str, Any] = {
            "vocab_size": self.vocab_size,
            "separator_id": self.separator_id,
            "splits": {name: [split.tokens, split.digest] for name, split in sorted(self.splits.items())},
        }
        counted = {name: split.counted_digest for name, split in self.splits.items() if split.counted_digest}
        if counted:
            content["counted"] = counted
        return json_digest(content)

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Dtype of the ids in every shard; little-endian."""
        return np.dtype(self.dtype).newbyteorder("<")

    def to_json(self) -> bytes:
        """Return the bytes of ``index.json``."""
        content = {"format": FORMAT, **asdict(self), "digest": self.digest}
        return (json.dumps(content, indent=2) + "\n").encode()


def json_digest(value: Any, **lists: Iterable[Any]) -> str:
    """Return the xxh3-128, hexadecimal, of ``value`` as JSON with sorted keys.

    ``lists`` are more entries of ``value``, an object. They are lists, and are never in memory as a whole.
    """
    digest = xxhash.xxh3_128()
    for part in _canonical_parts(value, lists) if lists else [_canonical(value)]:
        digest.update(part.encode())
    return digest.hexdigest()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _canonical_parts(value: Mapping[str, Any], lists: Mapping[str, Iterable[Any]]) -> Iterator[str]:
    between = "{"
    for name in sorted([*value, *lists]):
        yield f"{between}{_canonical(name)}:"
        between = ","
        if name in lists:
            yield "["
            for number, item in enumerate(lists[name]):
                yield f"{',' if number else ''}{_canonical(item)}"
            yield "]"
        else:
            yield _canonical(value[name])
    yield "}"


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


_FORMAT_1_COUNTS = {
    "num_empty": "empty files",
    "num_binary": "binary files",
    "num_not_utf8": "documents that are not UTF-8, invalid bytes replaced",
}
"""Counts in format 1 -> what they count."""


def _parse_index(content: dict[str, Any]) -> Index:
    splits = {name: _parse_split(raw) for name, raw in content["splits"].items()}
    if content["format"] == 1:
        counts = {what: content[name] for name, what in _FORMAT_1_COUNTS.items() if content[name]}
        passed_over, unreadable, text = LeftOut(counts), LeftOut(), TextSettings()
    else:
        passed_over, unreadable = (_parse_left_out(content[name]) for name in ("passed_over", "unreadable"))
        lists = {name: tuple(content["text"][name]) for name in ("notes", "warnings")}
        text = TextSettings(**{**content["text"], **lists})
    plain = {
        each.name: content[each.name]
        for each in fields(Index)
        if each.name not in ("splits", "passed_over", "unreadable", "text")
    }
    index = Index(**plain, splits=splits, passed_over=passed_over, unreadable=unreadable, text=text)
    if index.dtype not in DTYPES:
        raise ValueError(f"dtype {index.dtype!r} is not one of {', '.join(DTYPES)}")
    for name, split in splits.items():
        if split.tokens != sum(shard.tokens for shard in split.shards):
            raise ValueError(f"the shards of {name!r} do not add up to {split.tokens} tokens")
        for shard in split.shards:
            if shard.max_id >= index.vocab_size:
                raise ValueError(f"{shard.file} holds id {shard.max_id}, vocabulary {index.vocab_size}")
    return index


def _parse_left_out(raw: dict[str, Any]) -> LeftOut:
    return LeftOut(dict(raw["counts"]), tuple((where, reason) for where, reason in raw["first"]))


def _parse_split(raw: dict[str, Any]) -> SplitEntry:
    shards = tuple(ShardEntry(**entry) for entry in raw["shards"])
    for shard in shards:
        if Path(shard.file).name != shard.file:
            raise ValueError(f"{shard.file!r} is not a plain file name")
    return SplitEntry(**{**raw, "shards": shards})
