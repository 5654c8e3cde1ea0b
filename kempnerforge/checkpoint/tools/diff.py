"""What differs between two steps, tensor by tensor, however each was sharded. Needs no torch."""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import xxhash

from kempnerforge import fsio
from kempnerforge.checkpoint.format.step_info import StepView, tensor_bytes
from kempnerforge.checkpoint.format.tensor_index import ITEM_BYTES, Chunk, TensorEntry
from kempnerforge.errors import DamagedCheckpointError

PIECE_BYTES = 16 << 20
_MAX_OPEN_FILES = 32


@dataclass(frozen=True)
class TensorDifferences:
    """Names of tensors, by how they differ between step A and step B."""

    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    shape_or_dtype: dict[str, tuple[str, str]]
    """Name -> what it is in A and in B, such as ``F32 [4, 8]``."""
    content: tuple[str, ...] | None
    """Those of equal shape and dtype whose bytes differ; None when bytes were not compared."""
    equal: int
    """How many are in both and do not differ in anything that was compared."""

    @property
    def any(self) -> bool:
        """Whether a difference was found."""
        return bool(self.only_a or self.only_b or self.shape_or_dtype or self.content)


def compare_tensors(
    a: StepView,
    b: StepView,
    *,
    content: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TensorDifferences:
    """Compare all tensors of two steps. ``progress`` is told of the bytes read so far and of all.

    Bytes are read once, as they are: digests of files are not checked, so that it can be seen which tensors a
    damaged file touches. Raises DamagedCheckpointError for an index that is wrong, OSError.
    """
    in_a, in_b = a.tensors(), b.tensors()
    both = sorted(in_a.keys() & in_b.keys())
    changed = {
        name: (describe(in_a[name]), describe(in_b[name]))
        for name in both
        if describe(in_a[name]) != describe(in_b[name])
    }
    alike = [name for name in both if name not in changed]
    differing = None
    if content:
        differing = tuple(_differing(a, in_a, b, in_b, alike, progress))
    return TensorDifferences(
        only_a=tuple(sorted(in_a.keys() - in_b.keys())),
        only_b=tuple(sorted(in_b.keys() - in_a.keys())),
        shape_or_dtype=changed,
        content=differing,
        equal=len(alike) - len(differing or ()),
    )


def describe(entry: TensorEntry) -> str:
    """Dtype and shape, such as ``F32 [4, 8]``."""
    return f"{entry.dtype} {list(entry.shape)}"


def changes(before: Any, now: Any, path: str = "") -> dict[str, list[Any]]:
    """Dotted key -> both values, where two trees of tables differ; None where a key is missing."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        found: dict[str, list[Any]] = {}
        for key in sorted({*before, *now}):
            below = f"{path}.{key}" if path else str(key)
            found |= changes(before.get(key), now.get(key), below)
        return found
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = enumerate(zip(before, now, strict=True))
        return {
            key: values for place, pair in pairs for key, values in changes(*pair, f"{path}[{place}]").items()
        }
    return {} if before == now else {path: [before, now]}


def _differing(
    a: StepView,
    in_a: Mapping[str, TensorEntry],
    b: StepView,
    in_b: Mapping[str, TensorEntry],
    names: list[str],
    progress: Callable[[int, int], None],
) -> Iterator[str]:
    done, total = 0, 2 * sum(tensor_bytes(in_a[name]) for name in names)
    with closing(_Files(a)) as files_a, closing(_Files(b)) as files_b:
        for name in names:
            digests = []
            for files, entry in ((files_a, in_a[name]), (files_b, in_b[name])):
                digest = xxhash.xxh3_128()
                for piece in content_of(entry, files.read):
                    digest.update(piece)
                    done += piece.nbytes
                    progress(done, total)
                digests.append(digest.digest())
            if digests[0] != digests[1]:
                yield name


def content_of(entry: TensorEntry, read: Callable[[str, int, int], memoryview]) -> Iterator[memoryview]:
    """The bytes of a tensor in row-major order, in pieces that are valid until the next.

    The same for the same tensor, whatever boxes it is stored in. ``read(file, begin, end)`` gives bytes of a
    file. Needs memory for one piece, or for one row of the first dimension where the chunks split others and
    that is more.
    """
    if math.prod(entry.shape) == 0:
        return
    if all(chunk.sizes[1:] == entry.shape[1:] for chunk in entry.chunks):
        # Split along the first dimension at most: the chunks follow each other.
        for chunk in sorted(entry.chunks, key=lambda chunk: chunk.offsets):
            for begin in range(chunk.begin, chunk.end, PIECE_BYTES):
                yield read(chunk.file, begin, min(begin + PIECE_BYTES, chunk.end))
        return
    row_bytes = math.prod(entry.shape[1:]) * ITEM_BYTES[entry.dtype]
    rows = max(1, PIECE_BYTES // row_bytes)
    for first in range(0, entry.shape[0], rows):
        yield _assemble(entry, first, min(first + rows, entry.shape[0]), read)


def _assemble(
    entry: TensorEntry, first: int, last: int, read: Callable[[str, int, int], memoryview]
) -> memoryview:
    """Rows ``first`` to ``last`` of a tensor, put together from the boxes that touch them."""
    import numpy as np  # takes longer to import than most commands take

    item_bytes = ITEM_BYTES[entry.dtype]
    rows = np.empty((last - first, *entry.shape[1:], item_bytes), dtype=np.uint8)
    for chunk in entry.chunks:
        begin, end = max(first, chunk.offsets[0]), min(last, chunk.offsets[0] + chunk.sizes[0])
        if begin >= end:
            continue
        row_bytes = math.prod(chunk.sizes[1:]) * item_bytes
        at = chunk.begin + (begin - chunk.offsets[0]) * row_bytes
        data = read(chunk.file, at, at + (end - begin) * row_bytes)
        box = np.frombuffer(data, dtype=np.uint8).reshape(end - begin, *chunk.sizes[1:], item_bytes)
        rows[(slice(begin - first, end - first), *_other_dimensions(chunk))] = box
    return rows.reshape(-1).data


def _other_dimensions(chunk: Chunk) -> tuple[slice, ...]:
    return tuple(
        slice(offset, offset + size) for offset, size in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)
    )


class _Files:
    """Files of a step, of which the last used stay open."""

    def __init__(self, view: StepView) -> None:
        self._view = view
        self._open: OrderedDict[str, int] = OrderedDict()
        self._buffer = memoryview(bytearray(PIECE_BYTES))

    def close(self) -> None:
        """Close what is open."""
        for fd in self._open.values():
            os.close(fd)

    def read(self, name: str, begin: int, end: int) -> memoryview:
        """Bytes ``begin`` to ``end`` of the file ``name``, valid until the next call.

        Raises DamagedCheckpointError when they are not in a file of the step.
        """
        path = self._view.path
        record = self._view.manifest.files.get(name)
        if record is None or end > record.size_bytes:
            raise DamagedCheckpointError(
                f"{path.name} is damaged: its index names byte {end} of {name}, which the manifest lacks"
            )
        fd = self._open.pop(name, None)
        if fd is None:
            fd = os.open(path / name, os.O_RDONLY | os.O_CLOEXEC)
        self._open[name] = fd
        if len(self._open) > _MAX_OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        size_bytes = end - begin
        buffer = self._buffer[:size_bytes] if size_bytes <= PIECE_BYTES else memoryview(bytearray(size_bytes))
        if fsio.read_range(fd, buffer, begin) < size_bytes:
            raise DamagedCheckpointError(f"{path.name} is damaged: {name} ends before byte {end}")
        return buffer
