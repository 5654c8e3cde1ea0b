"""``SafetensorsReader``: the storage reader for DCP. Only verified bytes reach a tensor."""

from __future__ import annotations

import contextlib
import gc
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path as FilePath
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
from torch.futures import Future

from kempnerforge.checkpoint.format import json_values, manifest, paths, structure
from kempnerforge.checkpoint.format.checksums import VerifiedFile
from kempnerforge.checkpoint.format.dtypes import DTYPES
from kempnerforge.checkpoint.format.json_values import MALFORMED
from kempnerforge.checkpoint.format.structure import FLAT, PATHS, Path, Structure
from kempnerforge.checkpoint.format.tensor_index import Index, shared_box
from kempnerforge.checkpoint.load.shadows import Shadows
from kempnerforge.checkpoint.load.tensor_reader import TensorSlice, read_parts
from kempnerforge.checkpoint.state.pieces import Boxes, check_target, global_shape, local_pieces, plain
from kempnerforge.checkpoint.state.tensor_leaves import Unpacker, tensor_names
from kempnerforge.errors import DamagedCheckpointError, MismatchError
from kempnerforge.torch_compat import set_element


class SafetensorsReader(StorageReader):
    """Reads format 1: ``dcp.load(state, storage_reader=SafetensorsReader(step_folder))``.

    Every block is digested before it is used. Unlike stock DCP, tensors are not cast: another dtype
    is a MismatchError. Nothing in the folder is unpickled. Raises DamagedCheckpointError,
    MismatchError, and OSError.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, known_manifest: manifest.Manifest | None = None
    ) -> None:
        self._open_index: Index | None = None
        self.reset(path)
        self._known_manifest = known_manifest

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Start another load, from another path if one is given."""
        if checkpoint_id is not None:
            self.path = paths.local_path(checkpoint_id)
            self._known_manifest: manifest.Manifest | None = None
        self.close()
        self._raw_objects: dict[str, Any] | None = None
        self._objects: dict[str, Any] | None = None
        self._structure: Structure = FLAT
        self._inside: frozenset[str] | None = None
        self._joined: dict[str, Path] | None = None

    @property
    def manifest(self) -> manifest.Manifest:
        """The step's manifest, checked against names and sizes."""
        if self._known_manifest is None:
            if (self.path / ".metadata").exists() and not (self.path / paths.MANIFEST).exists():
                raise MismatchError(
                    f"{self.path} is a checkpoint of stock DCP: read it with FileSystemReader"
                )
            self._known_manifest = manifest.load(self.path)
        return self._known_manifest

    @property
    def index(self) -> Index:
        """The step's index: tensor name -> entry."""
        if self._open_index is None:
            record = self.manifest.files[paths.INDEX]
            self._open_index = Index(VerifiedFile(self.path / paths.INDEX, record, keep=True))
        return self._open_index

    @property
    def raw_objects(self) -> dict[str, Any]:
        """The step's non-tensor leaves, by name, as tagged JSON (see ``json_values``)."""
        if self._raw_objects is None:
            data = manifest.read_verified(self.path, self.manifest, paths.TRAIN_STATE)
            try:
                body = json_values.parse_objects(data)
                self._structure = structure.decode(body.pop(PATHS, None))
            except MALFORMED as error:
                raise self._damaged_objects(error) from None
            self._raw_objects = body
        return self._raw_objects

    @property
    def objects(self) -> dict[str, Any]:
        """The step's non-tensor leaves, by name.

        Values of torch and numpy in them are ``json_values.Foreign``; ``leaf`` returns the values.
        """
        if self._objects is None:
            raw = self.raw_objects
            try:
                self._objects = {name: json_values.decode(value) for name, value in raw.items()}
            except MALFORMED as error:
                raise self._damaged_objects(error) from None
        return self._objects

    @property
    def structure(self) -> Structure:
        """Paths of the leaves in the saved state dict."""
        _ = self.raw_objects
        return self._structure

    @property
    def inside(self) -> frozenset[str]:
        """Names of the tensors inside non-tensor leaves, such as tuples."""
        if self._inside is None:
            try:
                self._inside = frozenset[str]().union(*map(tensor_names, self.raw_objects.values()))
            except MALFORMED as error:
                raise self._damaged_objects(error) from None
        return self._inside

    def leaf(self, name: str) -> Any:
        """Return a non-tensor leaf with its tensors and arrays. Raises KeyError, and the errors of a load."""
        encoded = self.raw_objects[name]
        unpacker = Unpacker(self.make_tensor)
        try:
            value = unpacker.unpack(encoded)
        except MALFORMED as error:
            raise self._damaged_objects(error) from None
        if unpacker.tensors:
            load_tensors(unpacker.tensors, self)
        return value

    @property
    def joined(self) -> dict[str, Path]:
        """Lists, by name, that are stored as several entries but that DCP without a target reads as one leaf.

        They contain no tensors and no dicts, except empty dicts, which have no entry.
        """
        if self._joined is None:
            lists = {structure.name_of(path): path for path in self.structure.bare_lists}
            self._joined = {name: path for name, path in lists.items() if not self._has_tensors(name)}
        return self._joined

    def _has_tensors(self, name: str) -> bool:
        return any(f"{name}.{rest}" not in self.inside for rest in self.index.under(f"{name}."))

    def _joined_list(self, name: str) -> Any:
        whole: dict[str, Any] = {}
        depth, found = len(self.joined[name]), self.structure
        for part in (*self.raw_objects, *found.empty):
            if found.path(part)[:depth] == self.joined[name]:
                value = {} if part in found.empty else self.leaf(part)
                set_element(whole, (name, *found.path(part)[depth:]), value)
        return whole[name]

    def make_tensor(self, name: str, tag: Mapping[str, Any]) -> torch.Tensor:
        """Create an empty tensor for one inside a leaf, on the device type it was saved from if available.

        Raises DamagedCheckpointError if the index lacks it.
        """
        try:
            dtype, shape = self.index.head(name)
        except KeyError:
            raise self._damaged_objects(f"{paths.INDEX} has no {name}") from None
        device = tag.get("device", "cpu")
        if device != "cpu" and not torch.get_device_module(device).is_available():
            device = "cpu"
        return torch.empty(shape, dtype=DTYPES[dtype], device=device)

    def _damaged_objects(self, error: object) -> DamagedCheckpointError:
        return DamagedCheckpointError(f"{self.path.name} is damaged: {paths.TRAIN_STATE}: {error}")

    def close(self) -> None:
        """Close the index file. ``objects`` and ``manifest`` can still be used."""
        if self._open_index is not None:
            self._open_index.close()
            self._open_index = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return DCP's metadata. Its entries are read from the index on access."""
        return Metadata(
            state_dict_metadata=_LazyMetadata(self),  # type: ignore[arg-type]
            planner_data=_LazyPaths(self),
        )

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Do nothing. Part of DCP's protocol."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan unchanged. Part of DCP's protocol."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans unchanged. Part of DCP's protocol."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read every item, file by file, in the order of the bytes."""
        parts, targets, shadows = [], [], Shadows()
        _check_targets(plan, planner)
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, self._pickled_in_memory(item.storage_index.fqn))
                continue
            target = planner.resolve_tensor(item)
            check_target(item.dest_index.fqn, target)
            targets.append((item, target))
            parts.append(self._part(item, shadows.of(item.dest_index.fqn, plain(target))))
        read_parts(self.path, self.manifest.files, parts)
        shadows.copy()
        for item, target in targets:
            planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _pickled_in_memory(self, name: str) -> io.BytesIO:
        # DCP's planner unpickles these bytes, which are pickled here from verified JSON. Earlier protocols
        # change the byte order of numpy arrays.
        buffer = io.BytesIO()
        value: Any = {}
        if name in self.raw_objects:
            value = self.leaf(name)
        elif name in self.joined:
            value = self._joined_list(name)
        torch.save(value, buffer, pickle_protocol=5)
        buffer.seek(0)
        return buffer

    def _part(self, item: ReadItem, target: torch.Tensor) -> TensorSlice:
        name, offsets = item.storage_index.fqn, tuple(item.storage_index.offset or ())
        entry = self.index[name]
        self.check_dtype(name, entry.dtype, target)
        chunk = next(chunk for chunk in entry.chunks if chunk.offsets == offsets)
        return TensorSlice(name, entry.dtype, chunk, tuple(item.storage_offsets), target)

    def check_dtype(self, name: str, stored: str, target: torch.Tensor) -> None:
        """Raise MismatchError if the tensor would have to be cast."""
        if target.dtype != DTYPES.get(stored):
            raise MismatchError(f"{name} is {DTYPES[stored]} in {self.path.name} and {target.dtype} here")

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether ``checkpoint_id`` holds a checkpoint of this format."""
        return (FilePath(checkpoint_id) / paths.MANIFEST).is_file()


@contextlib.contextmanager
def _no_looking_for_garbage() -> Iterator[None]:
    """Pause garbage collection, which takes as long as the load itself with thousands of planned items."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_no_looking_for_garbage()
def load_tensors(tensors: Mapping[str, torch.Tensor], reader: SafetensorsReader) -> None:
    """Fill ``tensors`` (by checkpoint name, DTensors included) in place, on each rank its own part.

    Not collective. Reads only the index entries and blocks that it needs. After an error the
    content of the tensors is undefined. Raises what ``SafetensorsReader`` raises, MismatchError for
    another shape, and KeyError for a name that the checkpoint lacks.
    """
    parts: list[TensorSlice] = []
    boxes, shadows = Boxes(), Shadows()
    for name in sorted(tensors, key=str.encode):
        tensor = tensors[name]
        dtype, shape = reader.index.head(name)
        check_target(name, tensor)
        if shape != (here := global_shape(tensor)):
            raise MismatchError(f"{name} is {shape} in {reader.path.name} and {here} here")
        for offsets, sizes, local in local_pieces(name, tensor, boxes):
            reader.check_dtype(name, dtype, local)
            local = shadows.of(name, local)
            for chunk in reader.index.part(name, offsets, sizes):
                shared = shared_box(chunk, offsets, sizes)
                assert shared is not None
                starts, lengths = shared
                target = local
                if lengths != sizes:
                    for dim, (start, length) in enumerate(zip(starts, lengths, strict=True)):
                        target = target.narrow(dim, start - offsets[dim], length)
                in_chunk = tuple(start - first for start, first in zip(starts, chunk.offsets, strict=True))
                parts.append(TensorSlice(name, dtype, chunk, in_chunk, target))
    read_parts(reader.path, reader.manifest.files, parts)
    shadows.copy()


def _check_targets(plan: LoadPlan, planner: LoadPlanner) -> None:
    """Check whole targets before a planner narrows them: narrowing a wrapper subclass copies it."""
    state_dict, boxes = getattr(planner, "state_dict", {}), Boxes()
    for name in {item.dest_index.fqn for item in plan.items if item.type != LoadItemType.BYTE_IO}:
        if isinstance(whole := state_dict.get(name), torch.Tensor):
            check_target(name, whole)
            if isinstance(whole, DTensor) and whole.device_mesh.get_coordinate() is not None:
                boxes.of(name, whole)


class _LazyMetadata(Mapping[str, TensorStorageMetadata | BytesStorageMetadata]):
    """A mapping that DCP's planners use like a dict. A rank reads only the index entries that it looks up.

    Tensors inside other leaves are found by name, but not listed. ``keys`` leaves out empty dicts,
    because a planner that finds a name there that its target lacks assumes a checkpoint of torch
    2.3. ``items`` has them, because planners without a target build one from it.
    """

    def __init__(self, reader: SafetensorsReader) -> None:
        self._reader = reader

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[str]:
        hidden, objects = self._reader.inside, self._reader.raw_objects
        yield from (name for name in self._reader.index if name not in hidden and name not in objects)
        yield from objects

    def items(self) -> Any:
        """Return all entries and empty dicts. A ``joined`` list replaces its parts."""
        found, joined = self._reader.structure, self._reader.joined
        whole = [(name, BytesStorageMetadata()) for name in joined]
        depths = {len(path) for path in joined.values()}

        def is_joined(name: str) -> bool:
            return any(found.path(name)[:depth] in joined.values() for depth in depths)

        entries = [(name, self[name]) for name in self if not is_joined(name)]
        hidden = [
            (name, {} if type(path[-1]) is int else BytesStorageMetadata())
            for name, path in found.empty.items()
            if not is_joined(name)
        ]
        return [*entries, *hidden, *whole]

    def __getitem__(self, name: str) -> TensorStorageMetadata | BytesStorageMetadata:
        if name in self._reader.raw_objects:
            return BytesStorageMetadata()
        with contextlib.suppress(KeyError):
            entry = self._reader.index[name]
            return TensorStorageMetadata(
                properties=TensorProperties(dtype=DTYPES[entry.dtype]),
                size=torch.Size(entry.shape),
                chunks=[
                    ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in entry.chunks
                ],
            )
        if name in self._reader.structure.empty or name in self._reader.joined:
            return BytesStorageMetadata()
        raise KeyError(name)


class _LazyPaths(Mapping[str, Path]):
    """Name -> path in the nested state dict, as DCP's ``planner_data``."""

    def __init__(self, reader: SafetensorsReader) -> None:
        self._reader = reader

    def __getitem__(self, name: str) -> Path:
        return self._reader.joined.get(name) or self._reader.structure.path(name)

    def __iter__(self) -> Iterator[str]:
        yield from _LazyMetadata(self._reader)
        yield from self._reader.structure.empty
        yield from self._reader.joined

    def __len__(self) -> int:
        return sum(1 for _ in self)
