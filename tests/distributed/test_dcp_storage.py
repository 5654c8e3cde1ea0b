"""Format 1 on disk: what is written, what stock DCP reads of it, what a reader refuses."""

from __future__ import annotations

import itertools
import json
import struct
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from kempnerforge.checkpoint.async_save import AsyncCheckpointer
from kempnerforge.checkpoint.format import manifest, paths
from kempnerforge.checkpoint.format.manifest import Provenance
from kempnerforge.checkpoint.load.dcp_reader import SafetensorsReader, load_tensors
from kempnerforge.checkpoint.save.dcp_writer import SafetensorsWriter
from kempnerforge.errors import DamagedCheckpointError, MismatchError, SaveFailedError

pytestmark = [pytest.mark.smoke, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]


def sample_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "model.weight": torch.randn(33, 7, generator=generator),
        "model.half": torch.randn(5, 3, 2, generator=generator).bfloat16(),
        "model.scalar": torch.tensor(4.5),
        "model.empty": torch.empty(0, 4),
        "model.bytes": torch.arange(11, dtype=torch.uint8),
        "model.transposed": torch.randn(6, 4, generator=generator).t(),
        "model.ints": torch.arange(9).reshape(3, 3),
        "model.flags": torch.tensor([True, False, True]),
    }


def empty_like(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(tensor, 1).contiguous() for name, tensor in tensors.items()}


def save_sample(folder: Path, **extra: object) -> Path:
    path = folder / "step_00000007"
    AsyncCheckpointer().save({**sample_tensors(), **extra}, path, provenance=Provenance(step=7))
    return path


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


def test_storage_round_trip_is_bit_exact(tmp_path: Path) -> None:
    path = save_sample(tmp_path)
    loaded = empty_like(sample_tensors())
    load_tensors(loaded, SafetensorsReader(path))
    assert_equal(loaded, sample_tensors())
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000007"]


def test_dcp_load_reads_tensors_and_other_leaves(tmp_path: Path) -> None:
    state = {"net": {"w": torch.ones(3)}, "epoch": 4, "pair": (1, float("inf")), "raw": {"x": b"\x00\xff"}}
    AsyncCheckpointer().save(state, tmp_path / "c")
    target = {"net": {"w": torch.zeros(3)}, "epoch": 0, "pair": None, "raw": {"x": None}}
    load(target, storage_reader=SafetensorsReader(tmp_path / "c"))
    torch.testing.assert_close(target["net"]["w"], torch.ones(3))
    assert (target["epoch"], target["pair"], target["raw"]) == (4, (1, float("inf")), {"x": b"\x00\xff"})


def test_hugging_face_reader_stock_reads_folder(tmp_path: Path) -> None:
    path = save_sample(tmp_path)
    loaded = empty_like(sample_tensors())
    load(loaded, storage_reader=HuggingFaceStorageReader(str(path)))
    assert_equal(loaded, sample_tensors())


def test_shard_file_layout_is_aligned_without_gaps(tmp_path: Path) -> None:
    path = save_sample(tmp_path)
    (shard,) = path.glob("*.safetensors")
    assert shard.name == "shard_00000_of_00001.safetensors"
    raw = shard.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert (8 + length) % 4096 == 0
    metadata = header.pop("__metadata__")
    assert set(json.loads(metadata["DCP_SHARDING_INFO"])) == set(header)
    spans = sorted(entry["data_offsets"] for entry in header.values())
    assert spans[0][0] == 0
    assert spans[-1][1] == len(raw) - 8 - length
    assert all(one[1] == other[0] for one, other in itertools.pairwise(spans))
    item_bytes = {"I64": 8, "F32": 4, "BF16": 2, "U8": 1, "BOOL": 1}
    sizes = [item_bytes[e["dtype"]] for e in sorted(header.values(), key=lambda e: e["data_offsets"])]
    assert sizes == sorted(sizes, reverse=True)


def test_save_unsupported_leaf_raises_before_writing(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"a\.b .*Path"):
        AsyncCheckpointer().save({"a": {"b": Path("/")}, "w": torch.ones(2)}, tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_save_over_committed_checkpoint_is_refused(tmp_path: Path) -> None:
    path = save_sample(tmp_path)
    before = (path / paths.MANIFEST).read_bytes()
    with pytest.raises(SaveFailedError, match="never replaced"):
        save_sample(tmp_path)
    assert (path / paths.MANIFEST).read_bytes() == before


def test_load_other_dtype_is_mismatch_not_cast(tmp_path: Path) -> None:
    path = save_sample(tmp_path)
    with pytest.raises(MismatchError, match=r"model\.weight is torch\.float32"):
        load_tensors({"model.weight": torch.zeros(33, 7, dtype=torch.bfloat16)}, SafetensorsReader(path))


def test_manifest_large_shard_has_digest_per_block(tmp_path: Path) -> None:
    big = {"w": torch.arange(5_000_000, dtype=torch.float32), "v": torch.randn(3, 1_000_000)}
    AsyncCheckpointer().save(big, tmp_path / "c")
    loaded = empty_like(big)
    load_tensors(loaded, SafetensorsReader(tmp_path / "c"))
    assert_equal(loaded, big)
    record = manifest.load(tmp_path / "c").files["shard_00000_of_00001.safetensors"]
    assert record.size_bytes > 32_000_000
    assert len(record.xxh3_128) == 2


def test_storage_writer_stock_dcp_save_round_trips(tmp_path: Path) -> None:
    save({"state": sample_tensors()}, storage_writer=SafetensorsWriter(tmp_path / "c"))
    loaded = empty_like({f"state.{name}": tensor for name, tensor in sample_tensors().items()})
    load_tensors(loaded, SafetensorsReader(tmp_path / "c"))
    assert_equal(loaded, {f"state.{name}": tensor for name, tensor in sample_tensors().items()})
    with pytest.raises(CheckpointException, match=r"epoch is a .*Path"):
        save({"epoch": Path("/")}, storage_writer=SafetensorsWriter(tmp_path / "d"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("name", ["shard_00000_of_00001.safetensors", "index.bin", "train_state.json"])
def test_load_flipped_byte_is_found(tmp_path: Path, name: str) -> None:
    path = save_sample(tmp_path, epoch=3)
    data = bytearray((path / name).read_bytes())
    for position in {0, len(data) // 2, len(data) - 1}:
        data[position] ^= 0x10
        (path / name).write_bytes(data)
        reader = SafetensorsReader(path)
        with pytest.raises(DamagedCheckpointError, match=f"step_00000007 is damaged: {name}"):
            load_tensors(
                empty_like(sample_tensors()), reader
            ) if name != "train_state.json" else reader.objects
        data[position] ^= 0x10


def save_sharded(folder: str) -> None:
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    full = torch.arange(7 * 6, dtype=torch.float32).reshape(7, 6)
    state = {
        "rows": distribute_tensor(full, mesh, [Replicate(), Shard(0)]),
        "columns": distribute_tensor(full, mesh, [Replicate(), Shard(1)]),
        "both": distribute_tensor(full, mesh, [Shard(0), Shard(1)]),
        "short": distribute_tensor(torch.arange(1.0), mesh, [Replicate(), Shard(0)]),
        "plain": full + 1,
        f"own.{rank}": torch.full((3,), rank),
    }
    AsyncCheckpointer().save(state, Path(folder) / "c")
    for placements in ([Shard(1), Shard(0)], [Replicate(), Shard(1)], [Replicate(), Replicate()]):
        target = {
            name: distribute_tensor(torch.zeros(7, 6), mesh, placements)
            for name in ("rows", "columns", "both")
        }
        load_tensors(target, SafetensorsReader(Path(folder) / "c"))
        for tensor in target.values():
            torch.testing.assert_close(tensor.full_tensor(), full, rtol=0, atol=0)


def test_load_sharded_tensors_under_any_placement(tmp_path: Path) -> None:
    run_ranks(save_sharded, 4, str(tmp_path))
    full = torch.arange(7 * 6, dtype=torch.float32).reshape(7, 6)
    loaded = {name: torch.zeros(7, 6) for name in ("rows", "columns", "both", "plain")}
    loaded |= {"short": torch.zeros(1)} | {
        f"own.{rank}": torch.zeros(3, dtype=torch.int64) for rank in range(4)
    }
    stock = empty_like(loaded)
    load_tensors(loaded, SafetensorsReader(tmp_path / "c"))
    load(stock, storage_reader=HuggingFaceStorageReader(str(tmp_path / "c")))
    for found in (loaded, stock):
        for name in ("rows", "columns", "both"):
            torch.testing.assert_close(found[name], full, rtol=0, atol=0)
        torch.testing.assert_close(found["plain"], full + 1, rtol=0, atol=0)
        assert [int(found[f"own.{rank}"][0]) for rank in range(4)] == [0, 1, 2, 3]
    sizes = [path.stat().st_size for path in (tmp_path / "c").glob("*.safetensors")]
    assert len(sizes) == 4


def save_with_one_bad_rank(folder: str) -> None:
    rank = dist.get_rank()
    state = {"w": torch.ones(2), "leaf": Path("/") if rank == 1 else 1}
    with pytest.raises(TypeError, match="rank 1: leaf"):
        AsyncCheckpointer().save(state, Path(folder) / "c")
    Path(folder, "blocker").touch()
    dist.barrier()
    with pytest.raises(SaveFailedError, match="rank 0: NotADirectoryError"):
        AsyncCheckpointer().save({"w": torch.ones(2)}, Path(folder) / "blocker" / "c")
    sharded = DTensor.from_local(torch.ones(2), init_device_mesh("cpu", (2,)), [Shard(0)])
    AsyncCheckpointer().save({"w": sharded}, Path(folder) / "d")


def test_save_error_on_one_rank_reaches_all_ranks(tmp_path: Path) -> None:
    run_ranks(save_with_one_bad_rank, 2, str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blocker", "d"]
