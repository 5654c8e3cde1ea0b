"""The reading half of the DCP plug-ins: only verified bytes reach a tensor."""

from __future__ import annotations

import contextlib
import gc
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.futures import Future

from kempnerforge.checkpoint import layout, manifest
from kempnerforge.checkpoint.digest import VerifiedFile
from kempnerforge.checkpoint.dtypes import DTYPES
from kempnerforge.checkpoint.index import Index, shared_box
from kempnerforge.checkpoint.leaves import decode_objects
from kempnerforge.checkpoint.part_reader import Part, read_parts
from kempnerforge.checkpoint.plan import local_part
from kempnerforge.errors import DamagedCheckpointError, MismatchError


class SafetensorsReader(StorageReader):
    """Reads format 1: ``dcp.load(state, storage_reader=SafetensorsReader(step_folder))``.

    Every block that is read is digested first. Unlike stock DCP it does not cast: a tensor of another dtype
    is a MismatchError. Nothing in the folder is unpickled. Raises DamagedCheckpointError, MismatchError, and
    OSError as it comes.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, known_manifest: manifest.Manifest | None = None
    ) -> None:
        self.reset(path)
        self._known_manifest = known_manifest

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Start another load, of another path when one is given."""
        if checkpoint_id is not None:
            self.path = layout.local_path(checkpoint_id)
            self._known_manifest: manifest.Manifest | None = None
        self._open_index: Index | None = None
        self._objects: dict[str, Any] | None = None

    @property
    def manifest(self) -> manifest.Manifest:
        """The step's manifest, checked against names and sizes."""
        if self._known_manifest is None:
            self._known_manifest = manifest.load(self.path)
        return self._known_manifest

    @property
    def index(self) -> Index:
        """The step's index: a mapping from tensor names to entries."""
        if self._open_index is None:
            record = self.manifest.files[layout.INDEX]
            self._open_index = Index(VerifiedFile(self.path / layout.INDEX, record, keep=True))
        return self._open_index

    @property
    def objects(self) -> dict[str, Any]:
        """The step's non-tensor leaves, by name."""
        if self._objects is None:
            data = manifest.read_verified(self.path, self.manifest, layout.TRAIN_STATE)
            try:
                self._objects = decode_objects(data)
            except (ValueError, TypeError, RecursionError) as error:
                raise DamagedCheckpointError(
                    f"{self.path.name} is damaged: {layout.TRAIN_STATE}: {error}"
                ) from None
        return self._objects

    def close(self) -> None:
        """Release the index file; ``objects`` and ``manifest`` stay readable."""
        if self._open_index is not None:
            self._open_index.close()
            self._open_index = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """DCP's metadata, whose entries are looked up in the index when they are asked for."""
        return Metadata(state_dict_metadata=_LazyMetadata(self))  # type: ignore[arg-type]

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Part of DCP's protocol; nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Part of DCP's protocol; the plan is fine as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Part of DCP's protocol; the plans are fine as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read every item, file by file and in the order of its bytes."""
        parts, targets = [], []
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, self._pickled_in_memory(item.storage_index.fqn))
                continue
            target = planner.resolve_tensor(item)
            targets.append((item, target))
            parts.append(self._part(item, target.detach()))
        read_parts(self.path, self.manifest.files, parts)
        for item, target in targets:
            planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _pickled_in_memory(self, name: str) -> io.BytesIO:
        # DCP's planner insists on unpickling; these bytes were pickled here, from checked JSON.
        buffer = io.BytesIO()
        torch.save(self.objects[name], buffer)
        buffer.seek(0)
        return buffer

    def _part(self, item: ReadItem, target: torch.Tensor) -> Part:
        name, offsets = item.storage_index.fqn, tuple(item.storage_index.offset or ())
        entry = self.index[name]
        self.check_dtype(name, entry.dtype, target)
        chunk = next(chunk for chunk in entry.chunks if chunk.offsets == offsets)
        return Part(name, entry.dtype, chunk, tuple(item.storage_offsets), target)

    def check_dtype(self, name: str, stored: str, target: torch.Tensor) -> None:
        """Raise MismatchError when the tensor would be cast."""
        if target.dtype != DTYPES.get(stored):
            raise MismatchError(f"{name} is {DTYPES[stored]} in {self.path.name} and {target.dtype} here")

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether there is a checkpoint of this format."""
        return (Path(checkpoint_id) / layout.MANIFEST).is_file()


@contextlib.contextmanager
def _no_looking_for_garbage() -> Iterator[None]:
    """None is made by the thousands of objects of a plan, and the search for it took as long as the load."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_no_looking_for_garbage()
def load_tensors(tensors: Mapping[str, torch.Tensor], reader: SafetensorsReader) -> None:
    """Fill ``tensors`` (by checkpoint name, DTensors included) in place, each rank its own part.

    Not collective. Only the index entries and the blocks that are needed are read. When it raises, the
    tensors may hold anything. Raises what ``SafetensorsReader`` raises, MismatchError for another shape,
    KeyError for a name that is not there.
    """
    parts: list[Part] = []
    boxes: dict[tuple[object, ...], Box] = {}
    for name in sorted(tensors, key=str.encode):
        tensor = tensors[name]
        dtype, shape = reader.index.head(name)
        reader.check_dtype(name, dtype, tensor)
        if shape != tuple(tensor.shape):
            raise MismatchError(f"{name} is {shape} in {reader.path.name} and {tuple(tensor.shape)} here")
        sizes, offsets = _box(tensor, boxes)
        with torch.no_grad():
            local = local_part(tensor)
        for chunk in reader.index.part(name, offsets, sizes):
            shared = shared_box(chunk, offsets, sizes)
            assert shared is not None
            starts, lengths = shared
            target = local
            if lengths != sizes:
                for dim, (start, length) in enumerate(zip(starts, lengths, strict=True)):
                    target = target.narrow(dim, start - offsets[dim], length)
            in_chunk = tuple(start - first for start, first in zip(starts, chunk.offsets, strict=True))
            parts.append(Part(name, dtype, chunk, in_chunk, target))
    read_parts(reader.path, reader.manifest.files, parts)


Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Sizes and offsets."""


def _box(tensor: torch.Tensor, known: dict[tuple[object, ...], Box]) -> Box:
    """What this rank holds of a tensor; ``known`` is filled, because many tensors are alike."""
    if not isinstance(tensor, DTensor):
        return tuple(tensor.shape), (0,) * tensor.ndim
    key = (tensor.shape, tensor.device_mesh, tensor.placements)
    if key not in known:
        sizes, offsets = compute_local_shape_and_global_offset(*key)
        known[key] = tuple(sizes), tuple(offsets)
    return known[key]


class _LazyMetadata(Mapping[str, TensorStorageMetadata | BytesStorageMetadata]):
    """What DCP's planners take for a dict, backed by the index: a rank reads the entries it asks for."""

    def __init__(self, reader: SafetensorsReader) -> None:
        self._reader = reader

    def __len__(self) -> int:
        return len(self._reader.index) + len(self._reader.objects)

    def __iter__(self) -> Iterator[str]:
        yield from self._reader.index
        yield from self._reader.objects

    def __getitem__(self, name: str) -> TensorStorageMetadata | BytesStorageMetadata:
        with contextlib.suppress(KeyError):
            entry = self._reader.index[name]
            return TensorStorageMetadata(
                properties=TensorProperties(dtype=DTYPES[entry.dtype]),
                size=torch.Size(entry.shape),
                chunks=[
                    ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in entry.chunks
                ],
            )
        if name in self._reader.objects:
            return BytesStorageMetadata()
        raise KeyError(name)
