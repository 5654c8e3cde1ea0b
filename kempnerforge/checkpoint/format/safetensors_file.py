"""Shard files: safetensors files whose data can be written with direct I/O and read by any tool.

- The data begins at a multiple of 4096. The header is padded with spaces, which safetensors allows.
- Tensors follow each other in descending element size, without gaps.
- The header has DCP's sharding entry, from which stock ``HuggingFaceStorageReader`` reads the
  offsets of each chunk in its tensor.

Headers are validated as they are read: no value in them is trusted.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kempnerforge.checkpoint.format.tensor_index import ITEM_BYTES, Chunk

DATA_ALIGNMENT = 4096
MAX_HEADER_BYTES = 100_000_000
"""The largest header that safetensors itself accepts."""

HeaderEntry = tuple[str, Chunk]
"""The dtype, and the chunk as the index would list it."""


@dataclass(frozen=True)
class ShardItem:
    """One chunk of a shard file."""

    name: str
    dtype: str
    """Safetensors name, such as ``BF16``."""
    offsets: tuple[int, ...]
    """Offsets of the chunk in the whole tensor."""
    sizes: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Size of the chunk."""
        return math.prod(self.sizes) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class ShardLayout:
    """The layout of one shard file."""

    header: bytes
    """The first bytes of the file, including length prefix and padding."""
    order: tuple[int, ...]
    """Positions of the given items, in the order of their bytes."""
    begins: tuple[int, ...]
    """For each given item, the offset of its first byte in the file."""
    size_bytes: int


def plan_image(items: Sequence[ShardItem]) -> ShardLayout:
    """Lay out ``items`` as one file. Their names must differ."""
    order = sorted(range(len(items)), key=lambda at: (-ITEM_BYTES[items[at].dtype], items[at].name))
    header: dict[str, object] = {}
    data_begins, cursor = [0] * len(items), 0
    for position in order:
        item = items[position]
        end = cursor + item.size_bytes
        assert item.name not in header, f"{item.name} twice in one file"
        header[item.name] = {"dtype": item.dtype, "shape": item.sizes, "data_offsets": [cursor, end]}
        data_begins[position], cursor = cursor, end
    sharding = {item.name: {"saved_offsets": item.offsets} for item in items}
    header["__metadata__"] = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(sharding)}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % DATA_ALIGNMENT)
    prefix = len(raw).to_bytes(8, "little") + raw
    return ShardLayout(
        header=prefix,
        order=tuple(order),
        begins=tuple(len(prefix) + begin for begin in data_begins),
        size_bytes=len(prefix) + cursor,
    )


def split_by_name(names: Sequence[str]) -> list[list[int]]:
    """Split positions of ``names`` into files such that no name occurs twice in one file."""
    files: list[list[int]] = []
    seen: dict[str, int] = {}
    for position, name in enumerate(names):
        number = seen.get(name, 0)
        seen[name] = number + 1
        if number == len(files):
            files.append([])
        files[number].append(position)
    return files


def read_header(path: Path, *, sharded: bool = True) -> dict[str, HeaderEntry]:
    """Return ``decode_header`` of the file at ``path``. Raises ValueError, OSError."""
    with open(path, "rb") as file:

        def read_bytes(begin: int, end: int) -> bytes:
            file.seek(begin)
            return file.read(end - begin)

        return decode_header(path.name, read_bytes, os.fstat(file.fileno()).st_size, sharded=sharded)


def decode_header(
    name: str, read_bytes: Callable[[int, int], bytes], size_bytes: int, *, sharded: bool = True
) -> dict[str, HeaderEntry]:
    """Return name -> dtype and chunk of everything in the shard ``name``.

    Args:
        name: the name of the file.
        read_bytes: returns bytes begin to end of the file. What it raises passes through.
        size_bytes: the size of the file.
        sharded: False for a safetensors file of any origin, in which every tensor is whole.

    Raises ValueError for a file that does not have the layout of format 1: tensors without gaps up
    to the end of the file, each listed in DCP's sharding entry.
    """
    header, data_begin = parse_header(read_bytes, size_bytes)
    try:
        metadata = header.pop("__metadata__", {})
        if sharded:
            offsets = json.loads(metadata["DCP_SHARDING_INFO"])
        else:
            offsets = {tensor: {"saved_offsets": [0] * len(body["shape"])} for tensor, body in header.items()}
        found = {tensor: _entry(name, tensor, body, offsets, data_begin) for tensor, body in header.items()}
    except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"its header lacks an entry or has one of the wrong type ({error!r})") from None
    if extra := offsets.keys() - found.keys():
        raise ValueError(f"its sharding entry names {sorted(extra)[0]}, which it does not hold")
    end = data_begin
    for name, (_, chunk) in sorted(found.items(), key=lambda item: (item[1][1].begin, item[1][1].end)):
        if chunk.begin != end:
            raise ValueError(f"{name} begins at byte {chunk.begin}, but the tensor before it ends at {end}")
        end = chunk.end
    if end != size_bytes:
        raise ValueError(f"its tensors end at byte {end} of {size_bytes}")
    return found


def parse_header(read_bytes: Callable[[int, int], bytes], size_bytes: int) -> tuple[Any, int]:
    """Return the JSON of a header, and the offset of the data. Check only that no name occurs twice.

    Raises ValueError, and what ``read_bytes`` raises.
    """
    if size_bytes < 8:
        raise ValueError("it is too short to have a header")
    (length,) = struct.unpack("<Q", read_bytes(0, 8))
    if length > min(size_bytes - 8, MAX_HEADER_BYTES):
        raise ValueError(f"its header would have {length} bytes")
    try:
        header = json.loads(read_bytes(8, 8 + length), object_pairs_hook=_without_repeats)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"its header cannot be parsed ({error})") from None
    return header, 8 + length


def _entry(file: str, name: str, body: dict[str, Any], offsets: dict[str, Any], begin: int) -> HeaderEntry:
    dtype, sizes = body["dtype"], tuple(int(size) for size in body["shape"])
    first, last = (int(offset) for offset in body["data_offsets"])
    starts = tuple(int(offset) for offset in offsets[name]["saved_offsets"])
    if dtype not in ITEM_BYTES or min((*sizes, *starts, 0)) < 0:
        raise ValueError(f"{name} has dtype {dtype!r}, shape {sizes}, offsets {starts}")
    if last - first != math.prod(sizes) * ITEM_BYTES[dtype]:
        raise ValueError(f"{name} is {dtype} of shape {sizes} in {last - first} bytes")
    return dtype, Chunk(file, begin + first, begin + last, starts, sizes)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice in its header")
    return found
