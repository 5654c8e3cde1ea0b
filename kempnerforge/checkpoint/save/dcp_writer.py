"""``SafetensorsWriter``: the storage writer for loops that save with stock ``dcp.save``."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import xxhash
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from kempnerforge.checkpoint.format import paths, structure
from kempnerforge.checkpoint.format.checksums import DigestingFile
from kempnerforge.checkpoint.format.dtypes import DTYPE_NAMES
from kempnerforge.checkpoint.format.safetensors_file import plan_image, split_by_name
from kempnerforge.checkpoint.format.structure import PATHS, Structure
from kempnerforge.checkpoint.save.commit import (
    CheckpointPayload,
    ExpectedFiles,
    FileReport,
    PlannedFile,
    PlannedItem,
    commit,
    make_temporary,
)
from kempnerforge.checkpoint.save.plan import check_cover, planned_item
from kempnerforge.checkpoint.state.pieces import check_name, check_storable, plain
from kempnerforge.checkpoint.state.tensor_leaves import Packer
from kempnerforge.errors import SaveFailedError


@dataclasses.dataclass(frozen=True)
class _RankId:
    """A rank's number, stored in its plan. A plan from a planner's cache has it too."""

    rank: int
    num_ranks: int


@dataclasses.dataclass(frozen=True)
class _Written:
    """A rank's report to the coordinator."""

    rank: int
    files: tuple[tuple[PlannedFile, FileReport], ...]
    """Under the names that the files have until the commit."""
    objects: Mapping[str, Any]
    """Non-tensor leaves as JSON."""


class SafetensorsWriter(StorageWriter):
    """``dcp.save(state_dict, storage_writer=SafetensorsWriter(path))`` writes and commits format 1.

    Use it in loops that keep stock DCP. Unlike ``AsyncCheckpointer`` it blocks and writes through
    the page cache. DCP's planner omits empty dicts, which ``AsyncCheckpointer`` keeps.

    The commit checks DCP's metadata against the ranks' reports. It cannot use the plans, because a
    planner that caches plans does not pass them on.
    """

    def __init__(
        self, checkpoint_id: str | os.PathLike[str], *, contents: CheckpointPayload | None = None
    ) -> None:
        self._contents = contents or CheckpointPayload()
        self.reset(checkpoint_id)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Start a new checkpoint, at another path if one is given."""
        if checkpoint_id is not None:
            self.final = paths.local_path(checkpoint_id)
            attempt = self._contents.provenance.attempt
            self.temporary = self.final.with_name(paths.temporary_name(self.final.name, attempt))

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing. Part of DCP's protocol."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Refuse names and dtypes that a checkpoint cannot hold. Omit empty chunks of larger tensors.

        Raises ValueError and TypeError, naming the leaf.
        """
        kept = []
        for item in plan.items:
            check_name(item.index.fqn)
            if item.type == WriteItemType.BYTE_IO or _chunk_of(item) is not None:
                kept.append(item)
        return dataclasses.replace(plan, items=kept)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the hidden folder and store each rank's number in its plan. Coordinator only.

        A plan from the cache of a caching planner has a number already.
        """
        make_temporary(self.final, self.temporary)
        return [
            dataclasses.replace(plan, storage_data=_RankId(rank, len(plans))) if plan.usable else plan
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's files. Every byte is durable on return.

        Raises TypeError and ValueError, naming the leaf, for what a checkpoint cannot hold.
        """
        future: Future[list[WriteResult]] = Future()
        if not plan.items:
            future.set_result([])
            return future
        try:
            written = self._write(plan, planner)
        except BaseException:
            # DCP does not tell the coordinator's writer of the failure, and other ranks may still write. So
            # with several ranks, leave the folder: the next save removes it.
            if plan.storage_data.num_ranks == 1:
                shutil.rmtree(self.temporary, ignore_errors=True)
            raise
        size_bytes = sum(report.record.size_bytes for _, report in written.files)
        future.set_result([WriteResult(plan.items[0].index, size_bytes, written)])
        return future

    def _write(self, plan: SavePlan, planner: SavePlanner) -> _Written:
        packer, objects = Packer(), {}
        chunks: list[tuple[PlannedItem, torch.Tensor]] = []
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                objects[item.index.fqn] = _pack(item, planner, packer)
            else:
                chunks.append(_resolve(item, planner))
        for name, tensor in packer.tensors.items():
            check_name(name)
            chunks.append(_whole(name, tensor))
        files = []
        for number, positions in enumerate(split_by_name([planned.item.name for planned, _ in chunks])):
            items = tuple(chunks[position][0] for position in positions)
            name = f"rank_{plan.storage_data.rank:05d}_{number:05d}{paths.SHARD_SUFFIX}"
            file = PlannedFile(name, items)
            files.append((file, self._write_file(file, [chunks[position][1] for position in positions])))
        return _Written(plan.storage_data.rank, tuple(files), objects)

    def _write_file(self, planned: PlannedFile, tensors: Sequence[torch.Tensor]) -> FileReport:
        image = plan_image(planned.shard_items)
        file = DigestingFile(self.temporary / planned.name)
        try:
            file.write(memoryview(image.header))
            for position in image.order:
                file.write(tensor_bytes(tensors[position]))
            record = file.finish()
        finally:
            file.close()
        return FileReport(record, xxhash.xxh3_128_hexdigest(image.header))

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Check the files, add index and manifest, commit. Coordinator only. Durable on return."""
        rank_reports: list[_Written] = [result.storage_data for of_rank in results for result in of_rank]
        rank_reports.sort(key=lambda written: written.rank)
        written = [file for of_rank in rank_reports for file in of_rank.files]
        files, reports = [], {}
        for number, (file, report) in enumerate(written):
            final = dataclasses.replace(file, name=paths.shard_name(number, len(written)))
            os.rename(self.temporary / file.name, self.temporary / final.name)
            files.append(final)
            reports[final.name] = report
        _check_complete(metadata, files)
        check_cover(item for file in files for item in file.items)
        objects: dict[str, Any] = {}
        for of_rank in reversed(rank_reports):  # the lowest rank's value counts
            objects |= of_rank.objects
        nested = _paths(metadata, objects)
        commit(
            self.temporary,
            self.final,
            expected=ExpectedFiles(tuple(files)),
            reports=reports,
            contents=dataclasses.replace(
                self._contents, objects={**self._contents.objects, **objects, **nested}
            ),
        )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether ``checkpoint_id`` is a path, not a URL."""
        return "://" not in str(checkpoint_id)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor in C order, without a copy if it is contiguous and on the CPU."""
    host = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return host.reshape(-1).view(torch.uint8).numpy().data


def _chunk_of(item: WriteItem) -> PlannedItem | None:
    """Return the planned chunk; None for an empty chunk of a tensor that has elements."""
    data, name = item.tensor_data, item.index.fqn
    assert data is not None
    if data.properties.layout is not torch.strided:
        raise TypeError(f"{name} has layout {data.properties.layout}: store it as a dense tensor")
    if data.properties.dtype not in DTYPE_NAMES:
        raise TypeError(
            f"{name} has dtype {data.properties.dtype}, which safetensors does not know: convert it"
        )
    dtype = DTYPE_NAMES[data.properties.dtype]
    return planned_item(name, dtype, data.chunk.offsets, data.chunk.sizes, data.size)


def _resolve(item: WriteItem, planner: SavePlanner) -> tuple[PlannedItem, torch.Tensor]:
    """Return a chunk and its values. A cached plan may have a dtype that the tensor no longer has."""
    name, data = item.index.fqn, item.tensor_data
    assert data is not None
    whole = getattr(planner, "state_dict", {}).get(name)
    if isinstance(whole, torch.Tensor):
        check_storable(name, whole)
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, torch.Tensor)
    check_storable(name, tensor)
    if tuple(tensor.shape) != tuple(data.chunk.sizes):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; {tuple(data.chunk.sizes)} was planned")
    planned = planned_item(name, DTYPE_NAMES[tensor.dtype], data.chunk.offsets, data.chunk.sizes, data.size)
    assert planned is not None, "prepare_local_plan left such items out"
    return planned, plain(tensor)


def _whole(name: str, tensor: torch.Tensor) -> tuple[PlannedItem, torch.Tensor]:
    """Return the chunk and values of a tensor inside another leaf."""
    check_storable(name, tensor)
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise TypeError(f"{name} is a {type(tensor).__name__} inside of another leaf: put it into a dict")
    planned = planned_item(name, DTYPE_NAMES[tensor.dtype], (0,) * tensor.ndim, tensor.shape, tensor.shape)
    assert planned is not None
    return planned, plain(tensor)


def _pack(item: WriteItem, planner: SavePlanner, packer: Packer) -> Any:
    """Return a non-tensor leaf as JSON."""
    name = item.index.fqn
    lookup_object = getattr(planner, "lookup_object", None)
    if lookup_object is None:
        raise TypeError(
            f"{name} is not a tensor, and {type(planner).__name__} has no lookup_object to get its value from"
        )
    return packer.pack(lookup_object(item.index), name=name)


def _check_complete(metadata: Metadata, files: Sequence[PlannedFile]) -> None:
    """Raise SaveFailedError if a chunk of DCP's metadata is in no file."""
    written = {(item.name, item.offsets, item.sizes) for file in files for item in file.shard_items}
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        for chunk in entry.chunks:
            key = (name, tuple(chunk.offsets), tuple(chunk.sizes))
            if key not in written and (0 not in chunk.sizes or 0 in entry.size):
                raise SaveFailedError(f"{name} at {key[1]} was not written")


def _paths(metadata: Metadata, objects: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry with the paths of the leaves, if the state dict is nested."""
    planned = metadata.planner_data
    if not isinstance(planned, Mapping):
        return {}
    leaves = {*metadata.state_dict_metadata, *objects}
    body = structure.encode(Structure({name: path for name, path in planned.items() if name in leaves}))
    return {} if body is None else {PATHS: body}
