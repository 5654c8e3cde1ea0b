"""``index.bin``: which bytes of which file hold which part of which tensor.

Sorted by name and seekable, so that a rank reads the entries it needs however many there are. Little-endian:

=========  ==========================================================================================
header     8 bytes ``KFINDEX1``, then u64: number of names, offset of the name table, offset of the files
records    one a name, in the order of the names: u16 length and UTF-8 name, 8 bytes dtype (the
           safetensors name, zero-padded), u8 ndim, u64 shape[ndim], u32 number of chunks, and for every
           chunk u32 file, u64 begin, u64 end (bytes in that file), u64 offsets[ndim], u64 sizes[ndim]
name table u64 offset of every record, and one more for the end of the last
files      JSON list of file names
=========  ==========================================================================================
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from kempnerforge.checkpoint.digest import VerifiedFile
from kempnerforge.errors import DamagedCheckpointError

MAGIC = b"KFINDEX1"
_HEADER = struct.Struct("<8sQQQ")

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
"""Bytes of one element by safetensors dtype name."""


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, contiguous in one file."""

    file: str
    begin: int
    end: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a checkpoint."""

    dtype: str
    """Safetensors name, such as ``F32``."""
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


def encode(entries: Mapping[str, TensorEntry]) -> bytes:
    """The bytes of ``index.bin``."""
    names = sorted(entries, key=str.encode)
    files = sorted({chunk.file for entry in entries.values() for chunk in entry.chunks})
    number_of = {name: number for number, name in enumerate(files)}
    body = bytearray(_HEADER.size)
    offsets = []
    for name in names:
        offsets.append(len(body))
        body += _encode_record(name, entries[name], number_of)
    table = len(body)
    body += struct.pack(f"<{len(names) + 1}Q", *offsets, table)
    files_at = len(body)
    body += json.dumps(files).encode()
    _HEADER.pack_into(body, 0, MAGIC, len(names), table, files_at)
    return bytes(body)


def _encode_record(name: str, entry: TensorEntry, number_of: dict[str, int]) -> bytes:
    raw, ndim = name.encode(), len(entry.shape)
    parts = [struct.pack(f"<H{len(raw)}s8sB", len(raw), raw, entry.dtype.encode(), ndim)]
    parts.append(struct.pack(f"<{ndim}QI", *entry.shape, len(entry.chunks)))
    chunk_format = struct.Struct(f"<IQQ{ndim}Q{ndim}Q")
    for chunk in sorted(entry.chunks, key=lambda chunk: chunk.offsets):
        parts.append(
            chunk_format.pack(number_of[chunk.file], chunk.begin, chunk.end, *chunk.offsets, *chunk.sizes)
        )
    return b"".join(parts)


class Index(Mapping[str, TensorEntry]):
    """The index of a committed step, read entry by entry through ``file``, whose digests are checked.

    Raises DamagedCheckpointError for anything that is not an index, and for a tensor whose chunks do not
    cover it exactly.
    """

    def __init__(self, file: VerifiedFile) -> None:
        self._file = file
        self._entries: dict[str, TensorEntry] = {}
        try:
            magic, self._count, self._table, files_at = _HEADER.unpack(file.read(0, _HEADER.size))
            if magic != MAGIC:
                raise ValueError("it does not begin with KFINDEX1")
            if self._table + 8 * (self._count + 1) != files_at:
                raise ValueError("its tables do not fit together")
            self._files = [str(name) for name in json.loads(file.read(files_at, file.record.size_bytes))]
        except (ValueError, TypeError, struct.error, RecursionError) as error:
            raise self._damaged(str(error)) from None

    def _damaged(self, what: str) -> DamagedCheckpointError:
        path = self._file.path
        return DamagedCheckpointError(f"{path.parent.name} is damaged: {path.name}: {what}")

    def close(self) -> None:
        """Release the file; entries that were looked up stay known."""
        self._file.close()

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        names = [self._record(position)[0] for position in range(self._count)]
        if any(one.encode() >= other.encode() for one, other in itertools.pairwise(names)):
            raise self._damaged("its names are not sorted")
        return iter(names)

    def __getitem__(self, name: str) -> TensorEntry:
        if name not in self._entries:
            self._entries[name] = self._find(name)
        return self._entries[name]

    def _find(self, name: str) -> TensorEntry:
        low, high = 0, self._count
        wanted = name.encode()
        while low < high:
            middle = (low + high) // 2
            found, raw = self._record(middle)
            if found == name:
                return self._entry(name, raw)
            if found.encode() < wanted:
                low = middle + 1
            else:
                high = middle
        raise KeyError(name)

    def _record(self, position: int) -> tuple[str, bytes]:
        begin, end = struct.unpack("<2Q", self._file.read(*_table_slot(self._table, position)))
        raw = self._file.read(begin, end)
        try:
            (length,) = struct.unpack_from("<H", raw)
            return raw[2 : 2 + length].decode(), raw[2 + length :]
        except (struct.error, UnicodeDecodeError) as error:
            raise self._damaged(f"record {position}: {error}") from None

    def _entry(self, name: str, raw: bytes) -> TensorEntry:
        try:
            dtype_raw, ndim = struct.unpack_from("<8sB", raw)
            dtype = dtype_raw.rstrip(b"\0").decode()
            *shape, count = struct.unpack_from(f"<{ndim}QI", raw, 9)
            chunk_format = struct.Struct(f"<IQQ{ndim}Q{ndim}Q")
            chunks = []
            for values in chunk_format.iter_unpack(raw[9 + 8 * ndim + 4 :]):
                file, begin, end, *box = values
                chunks.append(Chunk(self._files[file], begin, end, tuple(box[:ndim]), tuple(box[ndim:])))
        except (struct.error, UnicodeDecodeError, IndexError) as error:
            raise self._damaged(f"{name}: {error}") from None
        entry = TensorEntry(dtype, tuple(shape), tuple(chunks))
        problem = "chunks are missing" if len(chunks) != count else cover_problem(entry)
        if problem:
            raise self._damaged(f"{name}: {problem}")
        return entry


def _table_slot(table: int, position: int) -> tuple[int, int]:
    return table + 8 * position, table + 8 * (position + 2)


def cover_problem(entry: TensorEntry) -> str | None:
    """What keeps the chunks of ``entry`` from covering it exactly once; None when they do."""
    item_bytes = ITEM_BYTES.get(entry.dtype)
    if item_bytes is None:
        return f"dtype {entry.dtype!r} is unknown"
    covered = 0
    for chunk in entry.chunks:
        box = zip(chunk.offsets, chunk.sizes, entry.shape, strict=True)
        inside = all(offset + size <= full for offset, size, full in box)
        volume = math.prod(chunk.sizes)
        if not inside or chunk.end - chunk.begin != volume * item_bytes:
            return f"the chunk at {chunk.offsets} does not fit {entry.shape}"
        covered += volume
    if covered != math.prod(entry.shape):
        return f"chunks hold {covered} of {math.prod(entry.shape)} elements"
    if _overlap(entry.chunks):
        return "chunks overlap"
    return None


def _overlap(chunks: tuple[Chunk, ...]) -> bool:
    """Whether two boxes share an element, by a sweep along dimension 0."""
    active: list[Chunk] = []
    for chunk in sorted((c for c in chunks if math.prod(c.sizes)), key=lambda c: c.offsets[:1]):
        active = [a for a in active if not chunk.offsets or a.offsets[0] + a.sizes[0] > chunk.offsets[0]]
        if any(_boxes_meet(chunk, other) for other in active):
            return True
        active.append(chunk)
    return False


def _boxes_meet(one: Chunk, other: Chunk) -> bool:
    return all(
        a < b + sb and b < a + sa
        for a, sa, b, sb in zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    )
