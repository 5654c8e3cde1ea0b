"""A shard file: safetensors, laid out so that its data can be written directly and read by anyone.

The data begins at a multiple of 4096 (the header is padded with spaces, which safetensors allows), tensors
follow each other in descending element size without gaps, and the header carries DCP's sharding entry, by
which stock ``HuggingFaceStorageReader`` knows where each chunk lies in its tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from kempnerforge.checkpoint.format.tensor_index import ITEM_BYTES

DATA_ALIGNMENT = 4096


@dataclass(frozen=True)
class ShardItem:
    """One chunk that goes into a shard file."""

    name: str
    dtype: str
    """Safetensors name, such as ``BF16``."""
    offsets: tuple[int, ...]
    """Where the chunk lies in the whole tensor."""
    sizes: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the chunk."""
        return math.prod(self.sizes) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class ShardLayout:
    """Where everything goes in one shard file."""

    header: bytes
    """The first bytes of the file, length prefix and padding included."""
    order: tuple[int, ...]
    """Positions of the given items, in the order of their bytes."""
    begins: tuple[int, ...]
    """For each given item, the offset of its first byte in the file."""
    size_bytes: int


def plan_image(items: Sequence[ShardItem]) -> ShardLayout:
    """Lay out ``items``, whose names must differ, as one file."""
    order = sorted(range(len(items)), key=lambda place: (-ITEM_BYTES[items[place].dtype], items[place].name))
    header: dict[str, object] = {}
    data_begins, cursor = [0] * len(items), 0
    for place in order:
        item = items[place]
        end = cursor + item.size_bytes
        assert item.name not in header, f"{item.name} twice in one file"
        header[item.name] = {"dtype": item.dtype, "shape": item.sizes, "data_offsets": [cursor, end]}
        data_begins[place], cursor = cursor, end
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
    """Positions of ``names`` split into files so that no name occurs twice in one."""
    files: list[list[int]] = []
    seen: dict[str, int] = {}
    for place, name in enumerate(names):
        number = seen.get(name, 0)
        seen[name] = number + 1
        if number == len(files):
            files.append([])
        files[number].append(place)
    return files
