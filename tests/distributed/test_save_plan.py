"""The plan is made once, and again exactly when what a rank holds changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from kempnerforge.checkpoint.async_save import AsyncCheckpointer
from kempnerforge.checkpoint.load.dcp_reader import SafetensorsReader, load_tensors
from kempnerforge.checkpoint.save import plan
from kempnerforge.config.schema import AsyncCheckpointMode

pytestmark = pytest.mark.smoke

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors DCP was asked about, each time."""
    asked: list[int] = []
    held_chunks = plan.held_chunks

    def counted(tensors: Tensors) -> object:
        asked.append(len(tensors))
        return held_chunks(tensors)

    monkeypatch.setattr(plan, "held_chunks", counted)
    return asked


def loaded(path: Path, like: Tensors) -> Tensors:
    found = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
    load_tensors(found, SafetensorsReader(path))
    return found


CHANGES: dict[str, Callable[[Tensors], Tensors]] = {
    "values": lambda old: {name: tensor + 1 for name, tensor in old.items()},
    "another dtype": lambda old: {**old, "b": old["b"].double()},
    "another shape": lambda old: {**old, "b": old["b"].reshape(3, 2)},
    "another name": lambda old: {"a": old["a"], "c": old["b"]},
    "one more": lambda old: {**old, "c": torch.ones(7)},
    "one less": lambda old: {"a": old["a"]},
}


@pytest.mark.parametrize("change", CHANGES)
def test_save_plan_tree_changed_is_made_again(change: str, tmp_path: Path, plans: list[int]) -> None:
    checkpointer = AsyncCheckpointer(AsyncCheckpointMode.disabled)
    before = {"a": torch.rand(5), "b": torch.rand(2, 3)}
    after = CHANGES[change](before)
    try:
        for number in range(3):
            checkpointer.save(before, tmp_path / f"before{number}")
        checkpointer.save(after, tmp_path / "after")
    finally:
        checkpointer.close()
    assert plans == [2] if change == "values" else plans == [2, len(after)]
    found = loaded(tmp_path / "after", after)
    assert all(torch.equal(found[name], after[name]) for name in after)


def save_with_other_placements(folder: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.arange(48.0).reshape(6, 8)
    checkpointer = AsyncCheckpointer(AsyncCheckpointMode.async_)
    for number, dim in enumerate((0, 0, 1)):
        tensor = distribute_tensor(whole, mesh, [Shard(dim)])
        checkpointer.save({"w": tensor}, Path(folder) / f"c{number}")
    checkpointer.wait()
    dist.barrier()
    for number in range(3):
        assert torch.equal(loaded(Path(folder) / f"c{number}", {"w": whole})["w"], whole)
    checkpointer.close()


def test_save_plan_placements_changed_is_made_again(tmp_path: Path) -> None:
    run_ranks(save_with_other_placements, 2, str(tmp_path))
