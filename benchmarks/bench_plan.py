"""Cost of planning and metadata on rank 0 with hundreds or thousands of ranks: ours against DCP's.

    python benchmarks/bench_plan.py

One process simulates rank 0 of ``--ranks``. The messages of the other ranks are made beforehand.
Every rank holds its rows of ``--tensors`` tensors. The benchmark measures the work of rank 0 for a
save, without moving tensors:

  first      unpack the parts of all ranks, distribute, check, plan the files, encode the index
  repeated   a save of the same tree: compare, read and check all ranks' reports, write index and manifest

The work of DCP is to create its plan, unpack all ranks' plans, make and check the global plan, pack
it for all ranks, unpack their results, and write ``.metadata`` (``FileSystemWriter.finish``). With
its plan cache (``enable_plan_caching``) plans are not sent again. Ours reads the reports from a
real store (c10d's) and commits a real folder, whose shard files are empty files of the right size.
``before reading`` is the work of a rank before it reads tensors. Ours finds its parts in the index.
DCP unpickles ``.metadata`` and finds its chunks.
"""

from __future__ import annotations

import pickle
import shutil
import tempfile
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from bench import command, machine, pairs
from torch._C._distributed_c10d import TCPStore
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from kempnerforge.checkpoint.format import manifest
from kempnerforge.checkpoint.format.checksums import FileRecord, VerifiedFile
from kempnerforge.checkpoint.format.safetensors_file import ShardItem, plan_image
from kempnerforge.checkpoint.format.tensor_index import Index
from kempnerforge.checkpoint.save.commit import (
    CheckpointPayload,
    ExpectedFiles,
    FileReport,
    PlannedItem,
    commit,
)
from kempnerforge.checkpoint.save.plan import make_plan, signature_of
from kempnerforge.distributed.store_channel import StoreBoard, collect

SIZES = {
    "tiny": {"ranks": 8, "tensors": 20, "pairs": 2},
    "cpu": {"ranks": 512, "tensors": 300},
    "4096": {"ranks": 4096, "tensors": 300, "pairs": 3},
}
ROWS, COLUMNS = 2, 64
"""Shape of each tensor's part on a rank."""
INDEXES = ("index.bin", "manifest.json", ".metadata")


def name_of(tensor: int) -> str:
    """Return the name of a tensor."""
    return f"model.layers.{tensor:04d}.attention.wq.weight"


class OursFirstRank:
    """Plans once, then collects reports and commits."""

    def __init__(self, ranks: int, tensors: int, folder: Path) -> None:
        self._ranks, self._folder = ranks, folder
        self._held = [pickle.dumps(self._held_by(rank, tensors)) for rank in range(ranks)]
        self._state = {name_of(number): torch.zeros(ROWS, COLUMNS) for number in range(tensors)}
        self._signature = signature_of(self._state)
        store = TCPStore(
            "127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60), wait_for_workers=False
        )
        self._board = StoreBoard(store, "bench")
        self._expected: ExpectedFiles | None = None
        self._number = 0

    def _held_by(self, rank: int, tensors: int) -> list[PlannedItem]:
        shape = (ROWS * self._ranks, COLUMNS)
        return [
            PlannedItem(ShardItem(name_of(number), "F32", (ROWS * rank, 0), (ROWS, COLUMNS)), shape)
            for number in range(tensors)
        ]

    def first(self) -> float:
        """Return the seconds to plan."""
        started = time.perf_counter()
        plan = make_plan([pickle.loads(held) for held in self._held])
        self._expected = plan.expected
        took_s = time.perf_counter() - started
        self._messages = {}
        for rank, files in enumerate(plan.files):
            (file,) = files
            image = plan_image(file.shard_items)
            record = [image.size_bytes, ["0" * 32], xxhash.xxh3_128_hexdigest(image.header)]
            self._messages[rank] = {"files": {file.name: record}, "write_s": 0.0}
        return took_s

    def repeated(self) -> float:
        """Return the seconds of a later save. The reports of the others are in the store already."""
        assert self._expected is not None
        self._number += 1
        keys = {f"{self._number}/rank{rank}": message for rank, message in self._messages.items()}
        temporary, final = self._folder / ".ours.tmp", self._folder / f"ours-{self._number}"
        temporary.mkdir()
        for key, message in keys.items():
            self._board.post(key, message)
            for name, (size_bytes, _, _) in message["files"].items():
                with open(temporary / name, "wb") as file:
                    file.truncate(size_bytes)
        started = time.perf_counter()
        assert signature_of(self._state) == self._signature
        found = collect(self._board, list(keys), timeout_s=60)
        reports = {
            name: FileReport(FileRecord(size_bytes, tuple(digests)), header)
            for report in found.values()
            for name, (size_bytes, digests, header) in (report or {})["files"].items()
        }
        commit(temporary, final, expected=self._expected, reports=reports, contents=CheckpointPayload())
        took_s = time.perf_counter() - started
        for key in keys:  # each rank removes its own at the start of the next save
            self._board.forget(key)
        self._index = final / "index.bin"
        return took_s

    def load(self) -> float:
        """Return the seconds until the last rank knows what to read."""
        started = time.perf_counter()
        record = manifest.read(self._index.parent).files[self._index.name]
        with VerifiedFile(self._index, record, keep=True) as file:
            index = Index(file)
            parts = [index.part(name, (ROWS * (self._ranks - 1), 0), (ROWS, COLUMNS)) for name in self._state]
        assert all(len(part) == 1 for part in parts)
        return time.perf_counter() - started


class DcpFirstRank:
    """Does the work of ``dcp.save`` on rank 0, without the tensors."""

    def __init__(self, ranks: int, tensors: int, folder: Path, *, cache: bool) -> None:
        self._ranks, self._folder, self._cache = ranks, folder / f"dcp-{cache}", cache
        self._folder.mkdir()
        self._state = {name_of(number): torch.zeros(ROWS, COLUMNS) for number in range(tensors)}
        self._plans = [pickle.dumps(self._plan_of(rank, tensors)) for rank in range(ranks)]
        self._results: list[bytes] | None = None
        # A separate planner class, because the cache is keyed by the name of the class.
        self._planner_type = type(f"Planner{ranks}", (DefaultSavePlanner,), {})

    def _plan_of(self, rank: int, tensors: int) -> SavePlan:
        size = torch.Size((ROWS * self._ranks, COLUMNS))
        chunk = ChunkStorageMetadata(torch.Size((ROWS * rank, 0)), torch.Size((ROWS, COLUMNS)))
        properties = TensorProperties(dtype=torch.float32)
        items = [
            WriteItem(
                MetadataIndex(name_of(number), chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, size),
            )
            for number in range(tensors)
        ]
        return SavePlan(items, planner_data={})

    def first(self) -> float:
        """Return the seconds of the first save."""
        return self._save(self._plans)

    def repeated(self) -> float:
        """Return the seconds of a save of the same tree."""
        unchanged = pickle.dumps(SavePlan([], usable=False))
        return self._save([unchanged] * self._ranks if self._cache else self._plans)

    def _save(self, plans: list[bytes]) -> float:
        started = time.perf_counter()
        planner = self._planner_type(enable_plan_caching=self._cache)
        planner.set_up_planner(self._state, is_coordinator=True)
        planner.create_local_plan()
        deltas, metadata = planner.create_global_plan([pickle.loads(plan) for plan in plans])
        for delta in deltas:
            pickle.dumps(delta)
        took_s = time.perf_counter() - started
        if self._results is None:
            self._results = [pickle.dumps(self._results_of(plan, rank)) for rank, plan in enumerate(deltas)]
        writer = FileSystemWriter(self._folder)
        started = time.perf_counter()
        writer.finish(metadata, [pickle.loads(result) for result in self._results])
        return took_s + time.perf_counter() - started

    def _results_of(self, plan: SavePlan, rank: int) -> list[WriteResult]:
        size = 4 * ROWS * COLUMNS
        return [
            WriteResult(item.index, size, _StorageInfo(f"__{rank}_0.distcp", number * size, size))
            for number, item in enumerate(plan.items)
        ]

    def load(self) -> float:
        """Return the seconds to unpickle the metadata and to plan reading this rank's rows."""
        started = time.perf_counter()
        metadata: Metadata = pickle.loads((self._folder / ".metadata").read_bytes())
        mine = torch.Size((ROWS * (self._ranks - 1), 0))
        found = 0
        for name in self._state:  # as ``create_read_items_for_chunk_list`` compares every chunk
            stored: Any = metadata.state_dict_metadata[name]
            found += sum(chunk.offsets == mine for chunk in stored.chunks)
        assert found == len(self._state)
        return time.perf_counter() - started


def measure(player: OursFirstRank | DcpFirstRank, pair: int) -> pairs.Measured:
    """Measure one round. DCP without its cache does the same work at every save."""
    found = {}
    if pair < 0 or isinstance(player, OursFirstRank):
        found["first_s"] = player.first()
    found["repeated_s"] = player.repeated()
    found["load_s"] = player.load()
    return found


def main() -> None:
    """Measure and print."""
    arguments = command.parse(__doc__, SIZES)
    folder = Path(tempfile.mkdtemp(dir=arguments.dir or Path.cwd(), prefix="bench-"))
    try:
        given = (arguments.ranks, arguments.tensors, folder)
        players: dict[str, OursFirstRank | DcpFirstRank] = {
            "ours": OursFirstRank(*given),
            "dcp": DcpFirstRank(*given, cache=False),
            "cached": DcpFirstRank(*given, cache=True),
        }
        arms = {name: partial(measure, player) for name, player in players.items()}
        facts = machine.facts(folder)
        found = pairs.alternate(arms, arguments.pairs)
        sizes = {path.name: path.stat().st_size for path in sorted(folder.rglob("*")) if path.name in INDEXES}
    finally:
        shutil.rmtree(folder)

    def versus(label: str, name: str, other: str, goal: float, other_name: str = "") -> pairs.Comparison:
        values = pairs.column(found["ours"], name), pairs.column(found[other], other_name or name)
        return pairs.compare(label, *values, goal=goal)

    rows = [
        versus("first save / DCP", "first_s", "dcp", 1.0, "repeated_s"),
        versus("repeated save / DCP", "repeated_s", "dcp", 0.01),
        versus("repeated save / DCP, cached", "repeated_s", "cached", 0.1),
        versus("before reading / DCP", "load_s", "dcp", 1.0),
    ]
    print(f"{arguments.ranks} ranks, {arguments.tensors} tensors each; {machine.describe(facts)}")
    print(f"{arguments.pairs} pairs; bytes: {sizes}")
    pairs.show(rows, reference="DCP", others={})
    if arguments.json:
        pairs.write_json(arguments.json, rows, machine=facts, measured=found, sizes=sizes)


if __name__ == "__main__":
    main()
