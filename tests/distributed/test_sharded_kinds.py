"""ShardedTensors, DTensors of LocalShardsWrapper, partial DTensors; plan caching on several ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from support.state_trees import Wrapper, same
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_gather_tensor
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.shard import Shard as OldShard
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.optimizer import load_sharded_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys, load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

from kempnerforge.checkpoint.async_save import AsyncCheckpointer
from kempnerforge.checkpoint.load.dcp_reader import SafetensorsReader, load_tensors
from kempnerforge.checkpoint.save.dcp_writer import SafetensorsWriter

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed", "ignore:.*deprecated")

WHOLE = torch.arange(48.0).reshape(8, 6)


def sharded(rows: list[int], whole: torch.Tensor = WHOLE) -> Any:
    """A ShardedTensor of blocks of rows, dealt out to the ranks in turn."""
    rank, ranks, begin, mine = dist.get_rank(), dist.get_world_size(), 0, []
    for number, count in enumerate(rows):
        if number % ranks == rank:
            metadata = ShardMetadata([begin, 0], [count, 6], placement=f"rank:{rank}/cpu")
            mine.append(OldShard(whole[begin : begin + count].clone(), metadata))
        begin += count
    return sharded_tensor.init_from_local_shards(mine, (8, 6))


def of_wrapper(dtype: torch.dtype = torch.float32, whole: torch.Tensor = WHOLE) -> DTensor:
    """A DTensor whose local tensor has two blocks of columns on rank 0 and one on rank 1."""
    columns = [(0, 1), (1, 3)] if dist.get_rank() == 0 else [(3, 6)]
    shards = [whole[:, begin:end].to(dtype).clone() for begin, end in columns]
    local = LocalShardsWrapper(shards, [(0, begin) for begin, _ in columns])
    mesh = init_device_mesh("cpu", (2,))
    return DTensor.from_local(local, mesh, [Shard(1)], run_check=False, shape=WHOLE.shape, stride=(6, 1))


def _shards(local: Any) -> list[torch.Tensor]:
    return local.local_shards()


def blocks(tensor: Any) -> torch.Tensor:
    """What this rank holds, one block after the other."""
    if isinstance(tensor, DTensor):
        return torch.cat([one.reshape(-1) for one in _shards(tensor._local_tensor)])
    return torch.cat([shard.tensor.reshape(-1) for shard in tensor.local_shards()])


def save_and_load_shards(folder: str) -> None:
    zeros = torch.zeros_like(WHOLE)
    saves = [f"{folder}/{way}" for way in ("disabled", "async_with_pinned_mem", "writer")]
    for path in saves[:2]:
        with AsyncCheckpointer(Path(path).name) as checkpointer:
            for number in range(2):
                state = {
                    "old": sharded([3, 1, 2, 2], WHOLE + number),
                    "wrapped": of_wrapper(whole=WHOLE + number),
                    "half": of_wrapper(torch.bfloat16),
                    "plain": torch.ones(2),
                }
                checkpointer.save(state, path if number else f"{path}-before")
    save(
        {"old": sharded([3, 1, 2, 2], WHOLE + 1), "wrapped": of_wrapper(whole=WHOLE + 1)},
        storage_writer=SafetensorsWriter(saves[2]),
    )
    for path in saves:
        for by_dcp in (False, True):
            target = {"old": sharded([4, 3, 1], zeros), "wrapped": of_wrapper(whole=zeros)}
            crossed = {"wrapped": sharded([5, 1, 1, 1], zeros), "old": of_wrapper(whole=zeros)}
            dense = {
                "old": zeros.clone(),
                "wrapped": distribute_tensor(zeros, init_device_mesh("cpu", (2,)), [Shard(0)]),
            }
            for wanted in (target, crossed, dense):
                if by_dcp:
                    load(wanted, storage_reader=SafetensorsReader(path))
                else:
                    load_tensors(wanted, SafetensorsReader(path))
            full = WHOLE + 1
            assert torch.equal(blocks(target["old"]), blocks(sharded([4, 3, 1], full)))
            assert torch.equal(blocks(target["wrapped"]), blocks(of_wrapper(whole=full)))
            assert torch.equal(blocks(crossed["wrapped"]), blocks(sharded([5, 1, 1, 1], full)))
            assert torch.equal(blocks(crossed["old"]), blocks(of_wrapper(whole=full)))
            assert torch.equal(dense["old"], full)
            assert torch.equal(dense["wrapped"].full_tensor(), full)


def test_shards_of_several_kinds_round_trip(tmp_path: Path) -> None:
    run_ranks(save_and_load_shards, 2, str(tmp_path))
    half = torch.zeros(8, 6, dtype=torch.bfloat16)
    load_tensors({"half": half}, SafetensorsReader(tmp_path / "disabled"))
    assert torch.equal(half, WHOLE.bfloat16())


def under_way(tensor: DTensor, mesh: Any) -> DTensor:
    """Whole on all ranks, of a collective that nobody has waited for."""
    local = all_gather_tensor(tensor.to_local(), 0, mesh)
    assert isinstance(local, AsyncCollectiveTensor)
    return DTensor.from_local(local, mesh, [Replicate()])


def refuse_on_all_ranks(folder: str) -> None:
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    partial = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    whole = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    bad: list[tuple[dict[str, Any], str]] = [
        ({"w": partial}, "w is a partial DTensor"),
        ({"w": torch.empty(2, device="meta") if rank else torch.ones(2)}, "rank 1: w is on the meta device"),
        ({"a": (whole, 1)}, r"a\.0 is a DTensor inside another leaf"),
    ]
    with AsyncCheckpointer("async_with_pinned_mem") as checkpointer:
        for state, message in bad:
            with pytest.raises(TypeError, match=message):
                checkpointer.save({"ok": torch.ones(2), **state}, f"{folder}/c")
        checkpointer.save(
            {
                "w": whole,
                "whole": under_way(whole, mesh),
                "plain": all_gather_tensor(whole.to_local(), 0, mesh),
            },
            f"{folder}/good",
        )
    gathered = {"whole": DTensor.from_local(torch.zeros(4), mesh, [Replicate()])}
    load_tensors(gathered, SafetensorsReader(f"{folder}/good"))
    assert torch.equal(gathered["whole"].to_local(), torch.ones(4))
    plain = torch.zeros(4)
    load_tensors({"plain": plain}, SafetensorsReader(f"{folder}/good"))
    assert torch.equal(plain, torch.ones(4))
    with pytest.raises(CheckpointException, match=r"w is a .*Wrapper.*cannot be filled"):
        load({"w": Wrapper(torch.zeros(4))}, storage_reader=SafetensorsReader(f"{folder}/good"))
    with pytest.raises(TypeError, match="w is a partial DTensor"):
        load_tensors(
            {"w": DTensor.from_local(torch.ones(4), mesh, [Partial()])}, SafetensorsReader(f"{folder}/good")
        )


def test_tensors_refused_on_all_ranks_by_name(tmp_path: Path) -> None:
    run_ranks(refuse_on_all_ranks, 2, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def save_with_cached_plans(folder: str) -> None:
    """From the third save on, rank 1 alone has another plan."""
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    for number in range(4):
        state: dict[str, Any] = {
            "w": distribute_tensor(WHOLE + number, mesh, [Shard(0)]),
            f"own{rank}": torch.full((2,), float(rank + number)),
            "n": {"epoch": number, f"of{rank}": rank + number},
        }
        if rank == 1 and number >= 2:
            state["more"] = torch.full((3,), float(number))
        save(
            state,
            storage_writer=SafetensorsWriter(f"{folder}/c{number}"),
            planner=DefaultSavePlanner(enable_plan_caching=True),
        )


def test_storage_writer_partly_changed_cached_plans_save(tmp_path: Path) -> None:
    run_ranks(save_with_cached_plans, 2, str(tmp_path))
    for number in range(4):
        found = _load_state_dict_from_keys(storage_reader=SafetensorsReader(tmp_path / f"c{number}"))
        assert same(found["w"], WHOLE + number)
        assert same(found["own1"], torch.full((2,), 1.0 + number))
        assert found["n"] == {"epoch": number, "of0": number, "of1": 1 + number}
        assert same(found.get("more"), torch.full((3,), float(number)) if number >= 2 else None)
        names = sorted(path.name for path in (tmp_path / f"c{number}").glob("*.safetensors"))
        assert names == [f"shard_0000{rank}_of_00002.safetensors" for rank in range(2)]


def load_optimizer_of_fsdp1(folder: str) -> dict[str, Any]:
    state = {
        "model": {"w": WHOLE},
        "optim": {"state": {"w": {"m": sharded([4, 4]), "step": torch.tensor(3.0)}}, "lr": 0.1},
    }
    with AsyncCheckpointer() as checkpointer:
        checkpointer.save(state, f"{folder}/c")
    found = load_sharded_optimizer_state_dict(
        {"w": sharded([4, 4])}, "optim", SafetensorsReader(f"{folder}/c")
    )
    moments = found["optim"]["state"]["w"]
    return {"m": blocks(moments["m"]), "step": moments["step"], "lr": found["optim"]["lr"]}


def test_load_sharded_optimizer_state_dict_is_nested(tmp_path: Path) -> None:
    found = run_ranks(load_optimizer_of_fsdp1, 2, str(tmp_path))
    assert torch.equal(torch.cat([one["m"] for one in found]), WHOLE.reshape(-1))
    assert [(float(one["step"]), one["lr"]) for one in found] == [(3.0, 0.1)] * 2
