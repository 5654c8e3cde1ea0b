"""``index.bin``: which bytes of which file hold which chunk of which tensor.

It is sorted by name and seekable, so that a rank reads only the entries that it needs.
Little-endian:

=========  ==========================================================================================
header     8 bytes ``KFINDEX1``, then u64: number of names, offset of the name table, offset of the files
records    one per name, in the order of the names: u16 length and UTF-8 name, 8 bytes dtype (the
           safetensors name, zero-padded), u8 ndim, u64 shape[ndim], u32 number of chunks, and for every
           chunk u32 file, u64 begin, u64 end (bytes in that file), u64 offsets[ndim], u64 sizes[ndim]
name table u64 offset of every record, and one more for the end of the last
files      JSON list of file names
=========  ==========================================================================================
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from kempnerforge.checkpoint.format.checksums import VerifiedFile
from kempnerforge.errors import DamagedCheckpointError

MAGIC = b"KFINDEX1"
_LONGEST_NAME = 2 + 0xFFFF
_FEW = 16
"""Up to this number of chunks, plain Python is faster than importing numpy."""
_HEADER = struct.Struct("<8sQQQ")

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
"""Bytes of one element by safetensors dtype name."""

SHORT_NAMES = {"F8_E4M3FNUZ": "F8E4FNUZ", "F8_E5M2FNUZ": "F8E5FNUZ"}
"""Safetensors name -> name in the index, for dtypes whose names exceed 8 bytes. Since format 1.1."""
_LONG_NAMES = {short: name for name, short in SHORT_NAMES.items()}


@dataclass(frozen=True)
class Chunk:
    """A box (rectangular part) of a tensor, stored contiguously in one file."""

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
    """Return the bytes of ``index.bin``."""
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
    dtype = SHORT_NAMES.get(entry.dtype, entry.dtype).encode()
    parts = [struct.pack(f"<H{len(raw)}s8sB", len(raw), raw, dtype, ndim)]
    parts.append(struct.pack(f"<{ndim}QI", *entry.shape, len(entry.chunks)))
    chunk_format = struct.Struct(f"<IQQ{ndim}Q{ndim}Q")
    for chunk in sorted(entry.chunks, key=lambda chunk: chunk.offsets):
        parts.append(
            chunk_format.pack(number_of[chunk.file], chunk.begin, chunk.end, *chunk.offsets, *chunk.sizes)
        )
    return b"".join(parts)


class _Record:
    """The record of one name. Its chunks are still packed."""

    __slots__ = ("chunk", "count", "dtype", "packed", "shape")

    def __init__(self, raw: memoryview) -> None:
        ndim = raw[8]
        dtype = bytes(raw[:8]).rstrip(b"\0").decode()
        self.dtype = _LONG_NAMES.get(dtype, dtype)
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"dtype {dtype!r} is unknown")
        *shape, self.count = struct.unpack_from(f"<{ndim}QI", raw, 9)
        self.shape = tuple(shape)
        self.packed = raw[9 + 8 * ndim + 4 :]
        self.chunk = struct.Struct(f"<IQQ{2 * ndim}Q")
        if self.packed.nbytes != self.count * self.chunk.size:
            raise ValueError("chunks are missing")


class Index(Mapping[str, TensorEntry]):
    """The index of a committed step, read record by record from the verified ``file``.

    ``file`` should keep its blocks, because names are found by bisection. Raises
    DamagedCheckpointError for a file that is not an index, and for a tensor whose chunks do not
    cover it exactly once.
    """

    def __init__(self, file: VerifiedFile) -> None:
        self._file = file
        self._entries: dict[str, TensorEntry] = {}
        self._records: dict[str, _Record] = {}
        self._likely = 0
        try:
            magic, count, table, files_at = _HEADER.unpack(file.read(0, _HEADER.size))
            if magic != MAGIC:
                raise ValueError("it does not begin with KFINDEX1")
            if table + 8 * (count + 1) != files_at:
                raise ValueError("its tables do not fit together")
            self._begins = struct.unpack(f"<{count + 1}Q", file.read(table, files_at))
            self._files = [str(name) for name in json.loads(file.read(files_at, file.record.size_bytes))]
        except (ValueError, TypeError, struct.error, RecursionError) as error:
            raise self._damaged(str(error)) from None

    def _damaged(self, what: str) -> DamagedCheckpointError:
        path = self._file.path
        return DamagedCheckpointError(f"{path.parent.name} is damaged: {path.name}: {what}")

    def close(self) -> None:
        """Close the file. Entries that were looked up remain available."""
        self._file.close()

    def __len__(self) -> int:
        return len(self._begins) - 1

    def __iter__(self) -> Iterator[str]:
        names = [self._name(position) for position in range(len(self))]
        if any(name >= following for name, following in itertools.pairwise(names)):
            raise self._damaged("its names are not sorted")
        return iter([self._decode(name) for name in names])

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._find(name) is not None

    def has_prefix(self, prefix: str) -> bool:
        """Return whether any name begins with ``prefix``."""
        wanted = prefix.encode()
        position = self._bisect(wanted)
        return position < len(self) and self._name(position).startswith(wanted)

    def under(self, prefix: str) -> list[str]:
        """Return the rest of every name that begins with ``prefix``, in order."""
        wanted, found = prefix.encode(), []
        position = self._bisect(wanted)
        while position < len(self) and (name := self._name(position)).startswith(wanted):
            found.append(self._decode(name[len(wanted) :]))
            position += 1
        return found

    def head(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return safetensors dtype and shape. Raises KeyError."""
        record = self._record(name)
        return record.dtype, record.shape

    def __getitem__(self, name: str) -> TensorEntry:
        if name not in self._entries:
            record = self._record(name)
            rows = record.chunk.iter_unpack(record.packed)
            entry = TensorEntry(record.dtype, record.shape, self._chunks(name, record, rows))
            if problem := cover_problem(entry):
                raise self._damaged(f"{name}: {problem}")
            self._entries[name] = entry
        return self._entries[name]

    def part(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> list[Chunk]:
        """Return the chunks that overlap the box at ``offsets``, ``sizes``. They cover it exactly once.

        Only these chunks are unpacked and checked, because a tensor that was saved by thousands of
        ranks has thousands of chunks. The box must have as many dimensions as the tensor. Raises
        KeyError.
        """
        record = self._record(name)
        if 0 in sizes:
            return []
        rows: Iterable[tuple[int, ...]] = record.chunk.iter_unpack(record.packed)
        if record.count > _FEW:
            rows = _rows_in_box(record.packed, offsets, sizes)
        found = [chunk for chunk in self._chunks(name, record, rows) if shared_box(chunk, offsets, sizes)]
        if problem := cover_problem(TensorEntry(record.dtype, record.shape, tuple(found)), (offsets, sizes)):
            raise self._damaged(f"{name}: {problem}")
        return found

    def _chunks(self, name: str, record: _Record, rows: Iterable[tuple[int, ...]]) -> tuple[Chunk, ...]:
        files, middle = self._files, 3 + len(record.shape)
        try:
            return tuple(Chunk(files[row[0]], row[1], row[2], row[3:middle], row[middle:]) for row in rows)
        except IndexError:
            raise self._damaged(f"{name}: a chunk names a file that is not in the table") from None

    def _record(self, name: str) -> _Record:
        if name not in self._records:
            position = self._find(name)
            if position is None:
                raise KeyError(name)
            begin, end = self._begins[position : position + 2]
            try:
                self._records[name] = _Record(self._file.view(begin, end)[2 + len(name.encode()) :])
            except (struct.error, ValueError, IndexError) as error:
                raise self._damaged(f"{name}: {error}") from None
        return self._records[name]

    def _find(self, name: str) -> int | None:
        """Return the position of ``name``. Try the next one first: names are mostly looked up in order."""
        wanted = name.encode()
        position = self._likely
        if position >= len(self) or self._name(position) != wanted:
            position = self._bisect(wanted)
            if position >= len(self) or self._name(position) != wanted:
                return None
        self._likely = position + 1
        return position

    def _bisect(self, wanted: bytes) -> int:
        return bisect.bisect_left(range(len(self)), wanted, key=self._name)

    def _name(self, position: int) -> bytes:
        begin, end = self._begins[position : position + 2]
        raw = self._file.view(begin, min(end, begin + _LONGEST_NAME))
        length = raw[0] | raw[1] << 8 if raw.nbytes > 1 else raw.nbytes
        if raw.nbytes < 2 + length:
            raise self._damaged(f"record {position} is too short")
        return bytes(raw[2 : 2 + length])

    def _decode(self, name: bytes) -> str:
        try:
            return name.decode()
        except UnicodeDecodeError as error:
            raise self._damaged(f"a name: {error}") from None


def _rows_in_box(
    packed: memoryview, offsets: tuple[int, ...], sizes: tuple[int, ...]
) -> list[tuple[int, ...]]:
    """Return the rows of many packed chunks that overlap a box."""
    import numpy as np  # imported late: reading a small index does not need it

    ndim = len(offsets)
    box = [("offsets", "<u8", (ndim,)), ("sizes", "<u8", (ndim,))]
    table = np.frombuffer(packed, np.dtype([("file", "<u4"), ("begin", "<u8"), ("end", "<u8"), *box]))
    begins = np.array(offsets, "<u8")
    ends = begins + np.array(sizes, "<u8")
    meet = (table["offsets"] < ends) & (table["offsets"] + table["sizes"] > begins)
    found = table[meet.all(axis=1)].tolist()
    return [(file, begin, end, *map(int, at), *map(int, size)) for file, begin, end, at, size in found]


def shared_box(
    chunk: Chunk, offsets: tuple[int, ...], sizes: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return offsets in the tensor and sizes of the overlap of ``chunk`` and a box; None if there is none."""
    if chunk.offsets == offsets and chunk.sizes == sizes:
        return offsets, sizes
    starts = tuple(map(max, chunk.offsets, offsets))
    ends = [min(a + n, b + m) for a, n, b, m in zip(chunk.offsets, chunk.sizes, offsets, sizes, strict=True)]
    lengths = tuple(end - start for start, end in zip(starts, ends, strict=True))
    return (starts, lengths) if min(lengths, default=1) > 0 else None


def cover_problem(
    entry: TensorEntry, box: tuple[tuple[int, ...], tuple[int, ...]] | None = None
) -> str | None:
    """Return why the chunks of ``entry`` do not cover it exactly once; None if they do.

    With a ``box`` (offsets, sizes) of the tensor, they have to cover the box, and all must overlap
    it.
    """
    item_bytes = ITEM_BYTES.get(entry.dtype)
    if item_bytes is None:
        return f"dtype {entry.dtype!r} is unknown"
    covered = 0
    for chunk in entry.chunks:
        dimensions = zip(chunk.offsets, chunk.sizes, entry.shape, strict=True)
        inside = all(offset + size <= full for offset, size, full in dimensions)
        volume = math.prod(chunk.sizes)
        if not inside or chunk.end - chunk.begin != volume * item_bytes:
            return f"the chunk at {chunk.offsets} does not fit {entry.shape}"
        shared = shared_box(chunk, *box) if box else None
        covered += math.prod(shared[1]) if shared else volume
    wanted = math.prod(box[1] if box else entry.shape)
    if covered != wanted:
        return f"chunks hold {covered} of {wanted} elements"
    if len(entry.chunks) > 1 and _overlap(entry.chunks):
        return "chunks overlap"
    return None


def _overlap(chunks: tuple[Chunk, ...]) -> bool:
    """Return whether two boxes share an element. Sweeps along dimension 0."""
    active: list[Chunk] = []
    for chunk in sorted((c for c in chunks if math.prod(c.sizes)), key=lambda c: c.offsets[:1]):
        active = [a for a in active if not chunk.offsets or a.offsets[0] + a.sizes[0] > chunk.offsets[0]]
        if any(_boxes_meet(chunk, other) for other in active):
            return True
        active.append(chunk)
    return False


def _boxes_meet(first: Chunk, second: Chunk) -> bool:
    return all(
        a < b + sb and b < a + sa
        for a, sa, b, sb in zip(first.offsets, first.sizes, second.offsets, second.sizes, strict=True)
    )
