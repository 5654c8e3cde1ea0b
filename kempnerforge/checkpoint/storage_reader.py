"""The reading half of the DCP plug-ins: only verified bytes reach a tensor."""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from kempnerforge.checkpoint import layout, manifest, shard_header
from kempnerforge.checkpoint.commit import decode_objects
from kempnerforge.checkpoint.digest import VerifiedFile
from kempnerforge.checkpoint.dtypes import DTYPE_NAMES, DTYPES
from kempnerforge.checkpoint.index import Chunk, Index
from kempnerforge.checkpoint.storage import tensor_bytes
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
        self._known_manifest = known_manifest
        self.reset(path)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Start another load, of another path when one is given."""
        if checkpoint_id is not None:
            self.path = Path(checkpoint_id)
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
            self._open_index = Index(VerifiedFile(self.path / layout.INDEX, record))
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
        per_file: dict[str, list[tuple[Chunk, ReadItem]]] = {}
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, self._pickled_in_memory(item.storage_index.fqn))
                continue
            chunk = self._chunk_of(item)
            per_file.setdefault(chunk.file, []).append((chunk, item))
        for name, wanted in sorted(per_file.items()):
            record = self.manifest.files.get(name)
            if record is None:
                raise DamagedCheckpointError(f"{self.path.name} is damaged: {name} is not in the manifest")
            wanted.sort(key=lambda pair: pair[0].begin)
            with VerifiedFile(self.path / name, record) as file:
                self._check_header(file, wanted)
                for chunk, item in wanted:
                    self._read_item(file, chunk, item, planner)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _check_header(self, file: VerifiedFile, wanted: list[tuple[Chunk, ReadItem]]) -> None:
        """Digests cannot tell two shards that changed places in the manifest too; what they hold can."""
        name = file.path.name
        try:
            header = shard_header.decode(name, file.read, file.record.size_bytes)
        except ValueError as error:
            raise DamagedCheckpointError(f"{self.path.name} is damaged: {name}: {error}") from None
        for chunk, item in wanted:
            tensor = item.storage_index.fqn
            if header.get(tensor) != (self.index[tensor].dtype, chunk):
                raise DamagedCheckpointError(
                    f"{self.path.name} is damaged: {name} and {layout.INDEX} disagree on {tensor}"
                )

    def _pickled_in_memory(self, name: str) -> io.BytesIO:
        # DCP's planner insists on unpickling; these bytes were pickled here, from checked JSON.
        buffer = io.BytesIO()
        torch.save(self.objects[name], buffer)
        buffer.seek(0)
        return buffer

    def _chunk_of(self, item: ReadItem) -> Chunk:
        entry = self.index[item.storage_index.fqn]
        offsets = tuple(item.storage_index.offset or ())
        return next(chunk for chunk in entry.chunks if chunk.offsets == offsets)

    def _read_item(self, file: VerifiedFile, chunk: Chunk, item: ReadItem, planner: LoadPlanner) -> None:
        target = planner.resolve_tensor(item).detach()
        name = item.storage_index.fqn
        stored = DTYPES[self.index[name].dtype]
        if target.dtype != stored:
            raise MismatchError(f"{name} is {stored} in {self.path.name} and {target.dtype} here")
        fill_box(file, chunk, tuple(item.storage_offsets), tuple(item.lengths), target)
        planner.commit_tensor(item, target)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether there is a checkpoint of this format."""
        return (Path(checkpoint_id) / layout.MANIFEST).is_file()


def fill_box(
    file: VerifiedFile, chunk: Chunk, starts: tuple[int, ...], lengths: tuple[int, ...], target: torch.Tensor
) -> None:
    """Copy the box ``starts``, ``lengths`` of ``chunk`` into ``target`` (shape ``lengths``, any device).

    Reads the rows of dimension 0 that the box touches, in full; straight into ``target`` where that is
    possible, else through one host tensor of those rows.
    """
    if math.prod(lengths) == 0:
        return
    row_bytes = (chunk.end - chunk.begin) // (chunk.sizes[0] if chunk.sizes else 1)
    begin = chunk.begin + (starts[0] * row_bytes if starts else 0)
    end = begin + (lengths[0] if lengths else 1) * row_bytes
    whole_rows = lengths[1:] == chunk.sizes[1:]
    direct = whole_rows and target.device.type == "cpu" and target.is_contiguous()
    host = target if direct else torch.empty((*lengths[:1], *chunk.sizes[1:]), dtype=target.dtype)
    view, done = tensor_bytes(host), 0
    for part in file.parts(begin, end):
        view[done : done + part.nbytes] = part
        done += part.nbytes
    if not direct:
        box = host
        for dim in range(1, len(lengths)):
            box = box.narrow(dim, starts[dim], lengths[dim])
        target.copy_(box)


def load_tensors(tensors: dict[str, torch.Tensor], reader: SafetensorsReader) -> None:
    """Fill ``tensors`` (by checkpoint name, DTensors included) in place, each rank its own part.

    Not collective: DCP's planner is driven for this rank alone, so that ranks can agree on the outcome
    afterwards. Raises what ``SafetensorsReader`` raises, KeyError for a name that is not there.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    planner.set_up_planner(dict(tensors), reader.read_metadata(), is_coordinator=True)
    (plan,) = planner.create_global_plan([planner.create_local_plan()])
    reader.read_data(planner.finish_plan(plan), planner).wait()


def dtype_name(tensor: torch.Tensor) -> str:
    """Safetensors name of a tensor's dtype."""
    return DTYPE_NAMES[tensor.dtype]


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
