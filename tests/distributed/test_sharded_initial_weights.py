"""Initial weights of sharded models are the bits of one process."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.initial_weights import CONFIG, digest, drawn
from support.ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor, empty
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from kempnerforge.distributed.mesh import build_mesh
from kempnerforge.model import init
from kempnerforge.model.init import init_weights_, normal_
from kempnerforge.model.llama import Llama
from kempnerforge.model.sharding import local_box

LAYOUTS: list[tuple[tuple[int, ...], list[Placement]]] = [
    ((4,), [Shard(0)]),
    ((4,), [Shard(1)]),
    ((2, 2), [Replicate(), Shard(0)]),
    ((2, 2), [Shard(0), Shard(1)]),
    ((2, 2), [Shard(0), Shard(0)]),
    ((2, 2), [Shard(1), Replicate()]),
]


def _check_dtensors() -> None:
    """Every layout and uneven shape: the box is where the data lies, the values are the plain tensor's."""
    init.BLOCK_NUMEL = 64
    for mesh_shape, placements in LAYOUTS:
        mesh = init_device_mesh("cpu", mesh_shape)
        for shape in ((16, 12), (7, 29), (3, 5), (1, 200), (2, 3, 7)):
            numbers = torch.arange(math.prod(shape)).view(shape)
            placed = distribute_tensor(numbers, mesh, placements)
            _check_box(placed, numbers)
            tensor = empty(shape, dtype=torch.float32, device_mesh=mesh, placements=placements)
            normal_(tensor, seed=5, name="w", std=0.02)
            assert torch.equal(tensor.full_tensor(), drawn(shape, name="w")), (mesh_shape, placements, shape)


def _check_box(tensor: DTensor, numbers: Tensor) -> None:
    box = local_box(tensor)
    if box.numel:
        index = tuple(slice(a, a + n) for a, n in zip(box.start, box.shape, strict=True))
        assert torch.equal(tensor.to_local().to(numbers.dtype), numbers[index])


def test_init_dtensor_layouts_match_plain_values() -> None:
    run_ranks(_check_dtensors, 4)


def _check_fsdp_over_tp() -> None:
    """Column- and row-parallel linear layers, sharded again by FSDP2: strided shards, uneven in both."""
    init.BLOCK_NUMEL = 64
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for rows, columns in ((16, 12), (6, 7), (10, 5), (7, 9), (2, 6)):
        model = nn.Sequential(nn.Linear(columns, rows, bias=False), nn.Linear(rows, columns, bias=False))
        numbers = torch.arange(float(rows * columns)).view(rows, columns)
        for layer, values in zip(model, (numbers, numbers.T), strict=True):
            layer.weight.data = values.contiguous()
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
        for name, values in (("0.weight", numbers), ("1.weight", numbers.T)):
            weight = model.get_parameter(name)
            assert isinstance(weight, DTensor)
            assert len(weight.placements) == 2
            _check_box(weight, values)
            normal_(weight, seed=5, name=name, std=0.02)
            _check_box(weight, drawn(tuple(values.shape), name=name))


@pytest.mark.smoke
def test_init_fsdp_over_tp_matches_plain_values() -> None:
    run_ranks(_check_fsdp_over_tp, 4)


def _model_digests(replicate: int, shard: int) -> dict[str, str]:
    """Digests of the whole tensors of a sharded model."""
    mesh = build_mesh("cpu", dp_replicate=replicate, dp_shard=shard)
    with torch.device("meta"):
        model = Llama(CONFIG)
    for module in (*model.layers.values(), model):
        fully_shard(module, mesh=mesh)
    model.to_empty(device="cpu")
    init_weights_(model, seed=1, init_std=0.02, n_layers=CONFIG.n_layers)
    found = {"rope": digest(model.rope.cos_TP)}
    for name, param in model.named_parameters():
        assert isinstance(param, DTensor)
        found[name] = digest(param.full_tensor())
    return found


def test_init_one_and_many_processes_same_bits() -> None:
    with torch.device("meta"):
        model = Llama(CONFIG)
    model.to_empty(device="cpu")
    init_weights_(model, seed=1, init_std=0.02, n_layers=CONFIG.n_layers)
    expected = {name: digest(param) for name, param in model.named_parameters()}
    expected["rope"] = digest(model.rope.cos_TP)
    for replicate, shard in ((1, 1), (1, 2), (1, 4), (2, 2), (4, 1)):
        for found in run_ranks(_model_digests, replicate * shard, replicate, shard):
            assert found == expected, (replicate, shard)


def _drawn_blocks(placements: list[Any]) -> list[int]:
    blocks: list[int] = []
    real, init.BLOCK_NUMEL = init.block_generator, 64

    def recording(seed: int, name: str, block: int) -> torch.Generator:
        blocks.append(block)
        return real(seed, name, block)

    init.block_generator = recording
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    normal_(empty((32, 16), device_mesh=mesh, placements=placements), seed=0, name="w", std=1.0)
    return blocks


@pytest.mark.smoke
def test_init_rank_draws_only_blocks_it_holds() -> None:
    assert run_ranks(_drawn_blocks, 2, [Shard(0)]) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert run_ranks(_drawn_blocks, 2, [Replicate()]) == [list(range(8)), list(range(8))]
