"""Extras, and state that refuses, on several ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.ranks import RanksFailed, gloo_group, run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from kempnerforge import AsyncCheckpointMode, CheckpointConfig, CheckpointManager, TrainState
from kempnerforge.checkpoint.format import paths
from kempnerforge.errors import MismatchError

MODES = [mode.value for mode in AsyncCheckpointMode]


class Held:
    """An object of a user's own. ``fails``: the method that raises."""

    def __init__(self, value: Any = None, fails: str = "") -> None:
        self.value = value
        self.fails = fails

    def state_dict(self) -> Any:
        """What it holds."""
        if self.fails == "state_dict":
            raise RuntimeError("its file is gone")
        return self.value

    def load_state_dict(self, value: Any) -> None:
        """Take it back."""
        if self.fails == "load_state_dict":
            raise RuntimeError("of another version")
        self.value = value


def manager(folder: str, state: TrainState, **config: Any) -> CheckpointManager:
    settings = CheckpointConfig.model_validate({"interval": 100, "async_mode": "async", **config})
    group = gloo_group() if dist.get_world_size() > 1 else None
    return CheckpointManager(settings, state=state, run_dir=Path(folder), control_group=group)


def train_state(**options: Any) -> TrainState:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    return TrainState(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), **options)


def save(folder: str, state: TrainState, **config: Any) -> None:
    with manager(folder, state, **config) as ckpt:
        ckpt.resume(state)
        state.advance()
        ckpt.save(state, wait=True)


def loader_of(rank: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(rank)
    state: dict[str, Any] = {
        "seen": 10 + rank,
        "generator": generator.get_state(),
        "order": np.arange(2000) * rank,
    }
    return {**state, f"worker_{rank}": {"open": [f"shard_{rank}"]}} if rank else state


def per_rank_round_trip(folder: str, mode: str) -> bool:
    """Every rank gets its own back, also leaves that no other rank has."""
    rank = dist.get_rank()
    extra = {"loader": Held(loader_of(rank)), "scheduler": Held({"at": 3})}
    save(folder, train_state(extra=extra, per_rank=["loader"]), async_mode=mode)
    again = {"loader": Held(), "scheduler": Held()}
    state = train_state(extra=again, per_rank=["loader"])
    with manager(folder, state) as ckpt:
        receipt = ckpt.resume(state)
    assert receipt.extras == ["loader", "scheduler"]
    assert again["scheduler"].value == {"at": 3}
    found, want = again["loader"].value, loader_of(rank)
    assert np.array_equal(found.pop("order"), want.pop("order"))
    assert torch.equal(found.pop("generator"), want.pop("generator"))
    return found == want


@pytest.mark.smoke
@pytest.mark.parametrize("mode", MODES)
def test_extra_per_rank_comes_back_on_each(mode: str, tmp_path: Path) -> None:
    assert run_ranks(per_rank_round_trip, 2, str(tmp_path), mode) == [True, True]


def resume_on_one(folder: str, excluded: list[str]) -> list[str]:
    state = train_state(extra={"loader": Held(), "scheduler": Held()}, per_rank=["loader"])
    with manager(folder, state, exclude_from_loading=excluded) as ckpt:
        return ckpt.resume(state).not_loaded


def test_extra_per_rank_on_fewer_ranks_is_named(tmp_path: Path) -> None:
    run_ranks(per_rank_round_trip, 2, str(tmp_path), "disabled")
    with pytest.raises(RanksFailed, match=r"MismatchError: extra\.loader has a separate state.*of 2 ranks"):
        run_ranks(resume_on_one, 1, str(tmp_path), [])
    assert run_ranks(resume_on_one, 1, str(tmp_path), ["extra.loader"]) == [["extra.loader"]]


def saves_that_fail(folder: str) -> list[str]:
    """Faults of one rank, as all ranks see them. Each is before anything is written."""
    rank = dist.get_rank()
    told = []
    part = nn.ModuleDict({f"stage{rank}": nn.Linear(2, 2)})
    cases: list[tuple[TrainState, type[Exception]]] = [
        (train_state(extra={"sampler": Held({"seen": rank})}), ValueError),
        (train_state(extra={"sampler": Held({"state": torch.full((5,), rank)})}), ValueError),
        (train_state(extra={"files": Held({"open": [Path("a") if rank else "a"]})}), TypeError),
        (train_state(extra={} if rank else {"own": Held()}, per_rank=() if rank else ["own"]), ValueError),
        (TrainState(model=part, optimizer=torch.optim.SGD(part.parameters())), ValueError),
    ]
    for number, (state, kind) in enumerate(cases):
        with pytest.raises(kind) as caught, manager(f"{folder}/{number}", state) as ckpt:
            ckpt.save(state, wait=True)
        told.append(str(caught.value))
    for number in range(len(cases)):
        assert paths.committed_steps(Path(folder, str(number), "checkpoints")) == []
    return told


def test_extra_faults_on_one_rank_raised_on_all(tmp_path: Path) -> None:
    first, second = run_ranks(saves_that_fail, 2, str(tmp_path))
    assert first == second
    differ, tensor, files, absent, stages = first
    assert "extra.sampler differs between ranks 0 and 1" in differ
    assert "per_rank=" in differ
    assert "extra.sampler differs between ranks 0 and 1" in tensor
    assert "rank 1: extra.files.open.0 is a pathlib" in files
    assert absent == "extra.own is on rank 0 and not on rank 1"
    assert "optimizer.groups differs between ranks 0 and 1" in stages
    assert "give groups=" in stages


def one_rank_raises(folder: str, method: str) -> str:
    rank = dist.get_rank()
    if method == "load_state_dict":
        save(folder, train_state(extra={"loader": Held(1)}))
    state = train_state(extra={"loader": Held(1, fails=method if rank else "")})
    with pytest.raises(Exception) as caught, manager(folder, state) as ckpt:  # noqa: PT012
        ckpt.resume(state)
        ckpt.save(state, wait=True)
    assert isinstance(caught.value, MismatchError) == (method == "load_state_dict")
    return str(caught.value)


@pytest.mark.parametrize("method", ["state_dict", "load_state_dict"])
def test_extra_that_raises_on_one_rank_raises_on_all(method: str, tmp_path: Path) -> None:
    texts = run_ranks(one_rank_raises, 2, str(tmp_path), method)
    for text in texts:
        assert ("its file is gone" if method == "state_dict" else "of another version") in text


class Ema:
    """An average of a model's weights, sharded like them."""

    def __init__(self, model: nn.Module) -> None:
        self.average = {name: value.detach().clone() for name, value in model.state_dict().items()}

    def update(self, model: nn.Module) -> None:
        """Take in the present weights."""
        for name, value in model.state_dict().items():
            self.average[name].lerp_(value, 0.1)

    def state_dict(self) -> dict[str, Any]:
        """The average."""
        return {"decay": 0.9, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.average = state["average"]


def ema_of_ranks(folder: str, steps: int) -> dict[str, torch.Tensor]:
    ranks = dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    if ranks > 1:
        mesh = init_device_mesh("cpu", (ranks,))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer, ema = torch.optim.SGD(model.parameters(), lr=0.1), Ema(model)
    state = TrainState(model=model, optimizer=optimizer, extra={"ema": ema})
    with manager(folder, state) as ckpt:
        ckpt.resume(state)
        for _ in range(steps):
            model(torch.ones(2, 3)).square().sum().backward()
            ckpt.wait_for_staging()
            optimizer.step()
            optimizer.zero_grad()
            ema.update(model)
            state.advance()
        ckpt.finish(state)
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for n, t in ema.average.items()}


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_extra_of_dtensors_reshards(before: int, after: int, tmp_path: Path) -> None:
    want = run_ranks(ema_of_ranks, before, str(tmp_path), 3)[0]
    for found in run_ranks(ema_of_ranks, after, str(tmp_path), 0):
        assert all(torch.equal(want[name], found[name]) for name in want)


class Halved(nn.Module):
    """Hands out its one row as two copies, and counts its loads."""

    loads = 0

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 4))
        self.register_state_dict_post_hook(self._split)
        self.register_load_state_dict_pre_hook(self._join)

    @staticmethod
    def _split(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        whole = state.pop(f"{prefix}weight")
        state[f"{prefix}left"], state[f"{prefix}right"] = whole * 1, whole * 2

    @staticmethod
    def _join(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
        module.loads += 1
        state[f"{prefix}weight"] = state.pop(f"{prefix}left")
        del state[f"{prefix}right"]


def loads_of_copies(folder: str) -> int:
    """Rank 1 holds no row."""
    model = Halved()
    rows = model.weight.detach()[dist.get_rank() :].clone()
    mesh, shape = init_device_mesh("cpu", (2,)), model.weight.shape
    model.weight = nn.Parameter(DTensor.from_local(rows, mesh, [Shard(0)], shape=shape, stride=(4, 1)))
    state = TrainState(model=model, optimizer={})
    save(folder, state)
    with manager(folder, state) as ckpt:
        ckpt.resume(state)
    return model.loads


def test_model_of_copies_is_loaded_on_ranks_without_rows(tmp_path: Path) -> None:
    assert run_ranks(loads_of_copies, 2, str(tmp_path)) == [1, 1]


def late_ema(folder: str) -> None:
    save(folder, train_state(extra={"ema": Held(distributed(torch.ones(4)))}))
    state = train_state(extra={"ema": Held()})
    with manager(folder, state) as ckpt:
        ckpt.resume(state)


def distributed(tensor: torch.Tensor) -> DTensor:
    return DTensor.from_local(tensor, init_device_mesh("cpu", (dist.get_world_size(),)))


def test_extra_of_dtensors_made_late_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RanksFailed, match=r"extra\.ema was saved from a sharded tensor"):
        run_ranks(late_ema, 2, str(tmp_path))
