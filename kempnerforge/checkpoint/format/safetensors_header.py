"""The header of a shard file, read without trusting a byte of it."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kempnerforge.checkpoint.format.tensor_index import ITEM_BYTES, Chunk

MAX_HEADER_BYTES = 100_000_000
"""What safetensors itself accepts."""

HeaderEntry = tuple[str, Chunk]
"""dtype, and the chunk as the index would have it."""


def read(path: Path, *, sharded: bool = True) -> dict[str, HeaderEntry]:
    """``decode`` the header of the file at ``path``. Raises ValueError, OSError."""
    with open(path, "rb") as file:

        def read_bytes(begin: int, end: int) -> bytes:
            file.seek(begin)
            return file.read(end - begin)

        return decode(path.name, read_bytes, os.fstat(file.fileno()).st_size, sharded=sharded)


def decode(
    name: str, read_bytes: Callable[[int, int], bytes], size_bytes: int, *, sharded: bool = True
) -> dict[str, HeaderEntry]:
    """Name -> dtype and chunk of everything in the shard ``name``, which has ``size_bytes``.

    Raises ValueError, saying what is wrong, for a file that is not laid out as format 1 says: tensors one
    after the other without gaps up to the end of the file, each listed in DCP's sharding entry. Without
    ``sharded`` it is a safetensors file of anyone's, in which every tensor is whole. What ``read_bytes``
    (from, up to) raises comes as it is.
    """
    header, data_begin = parse(read_bytes, size_bytes)
    try:
        metadata = header.pop("__metadata__", {})
        if sharded:
            offsets = json.loads(metadata["DCP_SHARDING_INFO"])
        else:
            offsets = {tensor: {"saved_offsets": [0] * len(body["shape"])} for tensor, body in header.items()}
        found = {tensor: _entry(name, tensor, body, offsets, data_begin) for tensor, body in header.items()}
    except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"its header lacks something or has it in another form ({error!r})") from None
    if extra := offsets.keys() - found.keys():
        raise ValueError(f"its sharding entry names {sorted(extra)[0]}, which it does not hold")
    end = data_begin
    for name, (_, chunk) in sorted(found.items(), key=lambda item: (item[1][1].begin, item[1][1].end)):
        if chunk.begin != end:
            raise ValueError(f"{name} begins at byte {chunk.begin}, and what is before it ends at {end}")
        end = chunk.end
    if end != size_bytes:
        raise ValueError(f"its tensors end at byte {end} of {size_bytes}")
    return found


def parse(read_bytes: Callable[[int, int], bytes], size_bytes: int) -> tuple[Any, int]:
    """The JSON of a header, unchecked but for names that occur twice, and where the data begins.

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
    first, last = (int(place) for place in body["data_offsets"])
    place = tuple(int(offset) for offset in offsets[name]["saved_offsets"])
    if dtype not in ITEM_BYTES or min((*sizes, *place, 0)) < 0:
        raise ValueError(f"{name} has dtype {dtype!r}, shape {sizes}, offsets {place}")
    if last - first != math.prod(sizes) * ITEM_BYTES[dtype]:
        raise ValueError(f"{name} is {dtype} of shape {sizes} in {last - first} bytes")
    return dtype, Chunk(file, begin + first, begin + last, place, sizes)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice in its header")
    return found
