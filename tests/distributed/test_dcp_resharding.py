"""Sharded tensors: saved under one placement, loaded under any other, beside stock DCP."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.dcp_pairs import (
    MODES,
    OURS,
    STOCK,
    WAYS,
    WRITER,
    State,
    assert_same,
    failure_of,
    load_by,
    load_without_target,
    save_by,
)
from support.ranks import run_ranks
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed._shard.sharding_spec.api import EnumerableShardingSpec, ShardingSpec
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper
from torch.distributed.tensor.placement_types import Placement, _StridedShard

SHAPES = {"even": (8, 4), "uneven": (7, 5), "few_rows": (1, 3), "one_column": (5, 1), "empty": (0, 3)}
ONE_WAY = (STOCK, "async", WRITER)
"""Our three modes plan alike: one of them is enough where only placements differ."""


def whole(name: str) -> torch.Tensor:
    """The full tensor of a shape in ``SHAPES``, another one for each name."""
    shape = SHAPES[name.split(".")[-1]]
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape) + len(name)


def placements_of(dims: int) -> list[tuple[Placement, ...]]:
    """All placements on a mesh of so many dimensions."""
    kinds: list[Placement] = [Shard(0), Shard(1), Replicate()]
    return list(itertools.product(kinds, repeat=dims))


def sharded(mesh: DeviceMesh, placements: tuple[Placement, ...], *, blank: bool = False) -> State:
    """A DTensor of each shape."""
    made = {}
    for name in SHAPES:
        full = torch.full(SHAPES[name], -1.0) if blank else whole(name)
        made[name] = spread(full, mesh, placements)
    return made


def spread(full: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """Each rank takes its part of its own copy: scattering gives wrong parts on a reversed mesh."""
    return distribute_tensor(full, mesh, placements, src_data_rank=None)


def sources(mesh: DeviceMesh) -> State:
    """DTensors of all shapes under all placements of ``mesh``, in one state dict."""
    return {
        f"p{number}": sharded(mesh, placements) for number, placements in enumerate(placements_of(mesh.ndim))
    }


def load_everywhere(way: str, path: Path, meshes: list[DeviceMesh], num_sources: int) -> None:
    """Load all sources under all placements of ``meshes``."""
    for mesh in meshes:
        for placements in placements_of(mesh.ndim):
            target = {f"p{number}": sharded(mesh, placements, blank=True) for number in range(num_sources)}
            load_by(way, target, path)
            wanted = sharded(mesh, placements)
            for number in range(num_sources):
                assert_same(target[f"p{number}"], wanted, f"{way} p{number} to {placements}")


def meshes_here() -> list[DeviceMesh]:
    """One-dimensional meshes in both orders, and a two-dimensional one when there are four ranks."""
    ranks = list(range(dist.get_world_size()))
    meshes = [init_device_mesh("cpu", (len(ranks),)), DeviceMesh("cpu", ranks[::-1])]
    return [*meshes, init_device_mesh("cpu", (2, len(ranks) // 2))] if len(ranks) == 4 else meshes


def reshard(folder: Path, ways: tuple[str, ...]) -> None:
    """Save on each mesh, load on all."""
    meshes = meshes_here()
    for way in ways:
        for place, mesh in enumerate(meshes):
            path = folder / f"{way}{dist.get_world_size()}.{place}"
            save_by(way, sources(mesh), path)
            load_everywhere(way, path, meshes, 3**mesh.ndim)


def load_on_other_number_of_ranks(folder: Path, ways: tuple[str, ...]) -> None:
    """Load what ``reshard`` saved with another number of ranks."""
    meshes = meshes_here()[:1]
    for way in ways:
        for path in sorted(folder.glob(f"{way}[0-9]*")):
            load_everywhere(way, path, meshes, 9 if path.name.endswith(".2") else 3)


def test_dtensors_load_under_any_placement_and_mesh(tmp_path: Path) -> None:
    """1-D and 2-D meshes, reversed ones, uneven shapes, more ranks than rows; then 2, 3 and 1 ranks."""
    run_ranks(reshard, 4, tmp_path, ONE_WAY)
    run_ranks(load_on_other_number_of_ranks, 3, tmp_path, ONE_WAY)
    run_ranks(load_on_other_number_of_ranks, 2, tmp_path, ONE_WAY)
    for way in ONE_WAY:
        for path in sorted(tmp_path.glob(f"{way}[0-9]*")):
            found = load_without_target(way, path)
            assert len(found) in (3, 9)
            for of_placement in found.values():
                assert_same(of_placement, {name: whole(name) for name in SHAPES}, f"{path.name}")


def test_dtensors_of_two_ranks_load_on_two_and_four(tmp_path: Path) -> None:
    run_ranks(reshard, 2, tmp_path, (STOCK, *MODES, WRITER))
    run_ranks(load_on_other_number_of_ranks, 4, tmp_path, (STOCK, MODES[-1], WRITER))


def submesh_and_order(folder: Path) -> None:
    """DTensors that only some ranks hold, tensors that all hold, keys in another order on each rank."""
    rank = dist.get_rank()
    mesh = DeviceMesh("cpu", [1, 2])
    lonely = DeviceMesh("cpu", [2])
    full = torch.arange(6.0).reshape(3, 2)

    def state(value: float, *, other: bool = False) -> State:
        placement = Shard(1) if other else Shard(0)
        leaves: State = {
            "part": spread(full * value, mesh, [placement]),
            "replicated": spread(full * value, mesh, [Replicate()]),
            "lonely": spread(full * value, lonely, [Shard(0)]),
            "plain": full * value,
            "number": int(value),
        }
        return dict(sorted(leaves.items(), reverse=bool(rank % 2)))

    for way in WAYS:
        save_by(way, state(2.0), folder / way)
        target = state(0.0, other=True)
        load_by(way, target, folder / way)
        assert_same(target, state(2.0, other=True), way)


@pytest.mark.smoke
def test_submesh_tensors_and_key_orders_come_back(tmp_path: Path) -> None:
    run_ranks(submesh_and_order, 3, tmp_path)
    for way in WAYS:
        found = load_without_target(way, tmp_path / way)
        full = torch.arange(6.0).reshape(3, 2) * 2
        tensors = dict.fromkeys(("part", "replicated", "lonely", "plain"), full)
        assert_same(found, {**tensors, "number": 2}, way)


def replicas(folder: Path) -> dict[str, torch.Tensor]:
    """A plain tensor that is not the same on all ranks, and which is large enough to be split."""
    rank = dist.get_rank()
    found = {}
    for way in WAYS:
        state = {f"t{number}": torch.full((50,), float(rank)) for number in range(6)}
        save_by(way, state, folder / way)
        target = {name: torch.full((50,), -1.0) for name in state}
        load_by(way, target, folder / way)
        found[way] = torch.stack(list(target.values()))
    return found


def test_tensor_that_differs_between_ranks_is_one_ranks(tmp_path: Path) -> None:
    """As with stock DCP: one rank's whole value, on all ranks the same."""
    first, second = run_ranks(replicas, 2, tmp_path)
    for way in WAYS:
        assert torch.equal(first[way], second[way]), way
        for row in first[way]:
            assert row.unique().tolist() in ([0.0], [1.0]), way


def chunk_specs() -> Iterator[ShardingSpec]:
    """Even, uneven, several shards on a rank, all shards on one rank, by columns, as a grid."""
    for dim in (0, 1):
        yield ChunkShardingSpec(dim=dim, placements=["rank:0/cpu", "rank:1/cpu"])
    yield ChunkShardingSpec(dim=0, placements=["rank:0/cpu", "rank:1/cpu", "rank:1/cpu", "rank:0/cpu"])
    yield ChunkShardingSpec(dim=0, placements=["rank:1/cpu"])
    rows = [(0, 2, 0), (2, 1, 1), (3, 3, 0), (6, 3, 1), (9, 1, 0)]
    yield EnumerableShardingSpec(
        [ShardMetadata([start, 0], [size, 6], f"rank:{rank}/cpu") for start, size, rank in rows]
    )
    grid = [(row, column) for row in (0, 5) for column in (0, 3)]
    yield EnumerableShardingSpec(
        [ShardMetadata([row, column], [5, 3], f"rank:{(row + column) % 2}/cpu") for row, column in grid]
    )


def fill(tensor: ShardedTensor, full: torch.Tensor | None) -> ShardedTensor:
    """Give a ShardedTensor the values of ``full``; None: all -1."""
    for shard in tensor.local_shards():
        (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
        part = full[row : row + rows, column : column + columns] if full is not None else torch.tensor(-1.0)
        shard.tensor.copy_(part)
    return tensor


def reshard_sharded_tensors(folder: Path) -> None:
    """Each ShardedTensor is loaded under all specs, as a plain tensor and as a DTensor, and back."""
    full = torch.arange(60.0).reshape(10, 6)
    specs = list(chunk_specs())
    mesh = init_device_mesh("cpu", (2,))

    def made(values: torch.Tensor | None, spec: ShardingSpec) -> ShardedTensor:
        return fill(sharded_tensor.zeros(spec, 10, 6), values)

    def many(make: Callable[[], torch.Tensor]) -> State:
        return {f"s{number}": make() for number in range(len(specs) + 2)}

    for way in WAYS:
        state: State = {f"s{number}": made(full, spec) for number, spec in enumerate(specs)}
        state[f"s{len(specs)}"] = full
        state[f"s{len(specs) + 1}"] = spread(full, mesh, [Shard(0)])
        save_by(way, state, folder / way)
        for spec in specs:
            target = many(lambda spec=spec: made(None, spec))
            load_by(way, target, folder / way)
            assert_same(target, many(lambda spec=spec: made(full, spec)), f"{way} {spec}")
        plain = many(lambda: torch.zeros(10, 6))
        load_by(way, plain, folder / way)
        assert_same(plain, many(lambda: full), way)
        target = many(lambda: spread(torch.zeros(10, 6), mesh, [Shard(1)]))
        load_by(way, target, folder / way)
        assert_same(target, many(lambda: spread(full, mesh, [Shard(1)])), way)


def test_sharded_tensors_load_under_any_spec(tmp_path: Path) -> None:
    run_ranks(reshard_sharded_tensors, 2, tmp_path)


def wrapped(mesh: DeviceMesh, full: torch.Tensor, boxes: list[list[tuple[int, int, int, int]]]) -> DTensor:
    """A DTensor of LocalShardsWrapper: by rank, boxes (row, column, rows, columns) of ``full``."""
    mine = boxes[dist.get_rank()]
    parts = [full[row : row + rows, column : column + columns].clone() for row, column, rows, columns in mine]
    offsets: list[tuple[int, ...]] = [(row, column) for row, column, *_ in mine]
    local = LocalShardsWrapper(parts, offsets)
    return DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=full.shape, stride=full.stride()
    )


BOXES = {
    "rows": [[(0, 0, 6, 6)], [(6, 0, 4, 6)]],
    "several": [[(0, 0, 2, 6), (2, 0, 3, 6)], [(5, 0, 5, 6)]],
    "columns": [[(0, 0, 10, 2), (0, 2, 10, 1)], [(0, 3, 10, 3)]],
    "one_rank": [[(0, 0, 10, 6)], []],
}
"""Tables of embeddings as torchrec shards them: by rows, by columns, several on a rank, all on one."""


def local_shards(folder: Path) -> None:
    """Each layout of BOXES is loaded under each other one, and as a plain tensor."""
    full = torch.arange(60.0).reshape(10, 6)
    mesh = init_device_mesh("cpu", (2,))
    for way in WAYS:
        save_by(way, {name: wrapped(mesh, full, boxes) for name, boxes in BOXES.items()}, folder / way)
        for boxes in BOXES.values():
            target = {name: wrapped(mesh, torch.zeros(10, 6), boxes) for name in BOXES}
            load_by(way, target, folder / way)
            wanted = wrapped(mesh, full, boxes).to_local()
            assert isinstance(wanted, LocalShardsWrapper)
            for name, tensor in target.items():
                found = tensor.to_local()
                assert isinstance(found, LocalShardsWrapper)
                assert_same(found.local_shards(), wanted.local_shards(), f"{way} {name}")
        plain = {name: torch.zeros(10, 6) for name in BOXES}
        load_by(way, plain, folder / way)
        assert_same(plain, dict.fromkeys(BOXES, full), way)


def test_local_shards_wrappers_load_under_any_layout(tmp_path: Path) -> None:
    run_ranks(local_shards, 2, tmp_path)


def rows_apart(folder: Path) -> None:
    """Rank 0 has rows 0, 1, 4 and 5 of eight: no box that DCP knows."""
    mesh = init_device_mesh("cpu", (2,))
    full = torch.arange(8.0)
    mine = full.reshape(2, 2, 2)[:, dist.get_rank()].reshape(-1)
    placements = [_StridedShard(0, split_factor=2)]

    def apart(local: torch.Tensor) -> DTensor:
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=full.shape, stride=(1,))

    assert torch.equal(apart(mine.clone()).full_tensor(), full)
    for way in OURS:
        found = failure_of(save_by, way, {"x": apart(mine.clone())}, folder / way)
        assert "Error" in found, way
        assert "x" in found.replace("Exception", ""), way
        save_by(way, {"x": full}, folder / f"{way}.plain")
        target = {"x": apart(torch.zeros(4))}
        found = failure_of(load_by, way, target, folder / f"{way}.plain")
        if found == "nothing":
            assert_same(target["x"].to_local(), mine, way)
        else:
            assert "TypeError" in found, way
            assert "x is" in found or "x has" in found, way


def test_rows_that_lie_apart_are_right_or_refused(tmp_path: Path) -> None:
    run_ranks(rows_apart, 2, tmp_path)
