"""The writing half of the DCP plug-ins: for loops that save with stock ``dcp.save``."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
import xxhash
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from kempnerforge.checkpoint import layout
from kempnerforge.checkpoint.commit import Contents, Expected, FileReport, PlannedFile, commit, make_temporary
from kempnerforge.checkpoint.digest import DigestingFile
from kempnerforge.checkpoint.plan import name_files, planned_item
from kempnerforge.checkpoint.shards import plan_image


@dataclasses.dataclass(frozen=True)
class _RankFile:
    """One file of one rank, and the positions of its items in the rank's plan."""

    file: PlannedFile
    positions: tuple[int, ...]


class SafetensorsWriter(StorageWriter):
    """``dcp.save(tensors, storage_writer=SafetensorsWriter(path))`` writes and commits format 1.

    For loops that stay with stock DCP: it blocks and writes through the page cache. ``AsyncCheckpointer``
    does not, and saves leaves that are no tensors too.
    """

    def __init__(self, checkpoint_id: str | os.PathLike[str], *, contents: Contents | None = None) -> None:
        self._contents = contents or Contents()
        self.reset(checkpoint_id)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Start a new checkpoint, under another path when one is given."""
        if checkpoint_id is not None:
            self.final = layout.local_path(checkpoint_id)
            attempt = self._contents.provenance.attempt
            self.temporary = self.final.with_name(layout.temporary_name(self.final.name, attempt))
        self._expected: Expected | None = None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Part of DCP's protocol; nothing to set up."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Refuse what is no tensor, leave out empty chunks of tensors that are not empty."""
        kept = [item for item in plan.items if planned_item(item) is not None]
        return dataclasses.replace(plan, items=kept)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the hidden folder and give every rank its files. Coordinator only."""
        make_temporary(self.final, self.temporary)
        by_rank = [[_planned(item) for item in plan.items] for plan in plans]
        shared_out = name_files(by_rank)
        self._expected = shared_out.expected
        result = []
        for plan, items, files in zip(plans, by_rank, shared_out.files, strict=True):
            place = {(one.item.name, one.item.offsets): number for number, one in enumerate(items)}
            rank_files = tuple(
                _RankFile(file, tuple(place[one.item.name, one.item.offsets] for one in file.items))
                for file in files
            )
            result.append(dataclasses.replace(plan, storage_data=rank_files))
        return result

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's files; every byte is durable when it returns."""
        results: list[WriteResult] = []
        for rank_file in plan.storage_data or ():
            items = [plan.items[place] for place in rank_file.positions]
            report = self._write_file(rank_file.file, items, planner)
            results.append(
                WriteResult(items[0].index, report.record.size_bytes, (rank_file.file.name, report))
            )
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write_file(self, planned: PlannedFile, items: list[WriteItem], planner: SavePlanner) -> FileReport:
        image = plan_image(planned.shard_items)
        file = DigestingFile(self.temporary / planned.name)
        try:
            file.write(memoryview(image.header))
            for place in image.order:
                tensor = planner.resolve_data(items[place])
                assert isinstance(tensor, torch.Tensor)
                file.write(tensor_bytes(tensor.detach().cpu().contiguous()))
            record = file.finish()
        finally:
            file.close()
        return FileReport(record, xxhash.xxh3_128_hexdigest(image.header))

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Check, add index and manifest, publish. Coordinator only. Durable on return."""
        assert self._expected is not None
        reports = dict(one.storage_data for of_rank in results for one in of_rank)
        commit(self.temporary, self.final, expected=self._expected, reports=reports, contents=self._contents)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether ``checkpoint_id`` is a path of this file system."""
        return "://" not in str(checkpoint_id)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _planned(item: WriteItem) -> Any:
    found = planned_item(item)
    assert found is not None, "prepare_local_plan left such items out"
    return found
