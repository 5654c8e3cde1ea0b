"""Compare two steps tensor by tensor, however each was sharded. Needs no torch."""

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
    """Name -> dtype and shape in A and in B, such as ``F32 [4, 8]``."""
    content: tuple[str, ...] | None
    """Tensors of equal shape and dtype whose bytes differ; None if bytes were not compared."""
    equal: int
    """Number of tensors without any difference in what was compared."""

    @property
    def any(self) -> bool:
        """Whether there is any difference."""
        return bool(self.only_a or self.only_b or self.shape_or_dtype or self.content)


def compare_tensors(
    a: StepView,
    b: StepView,
    *,
    content: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TensorDifferences:
    """Compare all tensors of two steps. ``progress`` is called with the bytes read so far, and the total.

    Bytes are read once, and digests are not checked, so that the result shows which tensors a
    damaged file affects. Raises DamagedCheckpointError for an invalid index, OSError.
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
    """Return dtype and shape, such as ``F32 [4, 8]``."""
    return f"{entry.dtype} {list(entry.shape)}"


def changes(before: Any, now: Any, path: str = "") -> dict[str, list[Any]]:
    """Return dotted key -> both values, where two nested tables differ; None for a missing key."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        found: dict[str, list[Any]] = {}
        for key in sorted({*before, *now}):
            below = f"{path}.{key}" if path else str(key)
            found |= changes(before.get(key), now.get(key), below)
        return found
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = enumerate(zip(before, now, strict=True))
        return {
            key: values
            for position, pair in pairs
            for key, values in changes(*pair, f"{path}[{position}]").items()
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
    """Yield the bytes of a tensor in row-major order, in pieces that are valid until the next.

    They do not depend on the chunks that the tensor is stored in. ``read(file, begin, end)``
    returns bytes of a file. Needs memory for one piece, or, if the chunks split other dimensions
    than the first, for one row of the first dimension if that is larger.
    """
    if math.prod(entry.shape) == 0:
        return
    if all(chunk.sizes[1:] == entry.shape[1:] for chunk in entry.chunks):
        # Split only along the first dimension: the chunks follow each other.
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
    """Return rows ``first`` to ``last`` of a tensor, assembled from the chunks that overlap them."""
    import numpy as np  # importing it takes longer than most commands

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
    """Files of a step. The most recently used ones are kept open."""

    def __init__(self, view: StepView) -> None:
        self._view = view
        self._open: OrderedDict[str, int] = OrderedDict()
        self._buffer = memoryview(bytearray(PIECE_BYTES))

    def close(self) -> None:
        """Close all files."""
        for fd in self._open.values():
            os.close(fd)

    def read(self, name: str, begin: int, end: int) -> memoryview:
        """Return bytes ``begin`` to ``end`` of the file ``name``, valid until the next call.

        Raises DamagedCheckpointError if the step has no such bytes.
        """
        path = self._view.path
        record = self._view.manifest.files.get(name)
        if record is None or end > record.size_bytes:
            raise DamagedCheckpointError(
                f"{path.name} is damaged: its index uses byte {end} of {name}, which is not in the manifest"
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
