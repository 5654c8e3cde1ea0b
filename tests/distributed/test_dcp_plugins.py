"""Our reader and writer under stock DCP's other tools: planners, caches, converters, asynchronous saves."""

from __future__ import annotations

import io
import socket
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from support.dcp_pairs import (
    OURS,
    STOCK,
    WRITER,
    State,
    assert_same,
    blank,
    failure_of,
    load_by,
    load_without_target,
    reader_of,
    save_by,
)
from support.ranks import run_ranks
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import (
    AsyncCheckpointerType,
    async_save,
    save,
    save_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from kempnerforge import AsyncCheckpointer, SafetensorsReader, SafetensorsWriter

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_reader_and_writer_are_used_for_other_paths(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "a")
    save({"w": torch.ones(2)}, storage_writer=writer)
    save({"w": torch.zeros(3), "n": 1}, checkpoint_id=tmp_path / "b", storage_writer=writer)
    reader = SafetensorsReader(tmp_path / "a")
    for name, wanted in (("a", {"w": torch.ones(2)}), ("b", {"w": torch.zeros(3), "n": 1}), ("a", None)):
        wanted = wanted or {"w": torch.ones(2)}
        target = blank(wanted)
        load(target, checkpoint_id=tmp_path / name, storage_reader=reader)
        assert_same(target, wanted, name)


def test_stock_reader_and_ours_refuse_each_other(tmp_path: Path) -> None:
    """On purpose: no ``.metadata`` pickle is written, and none is read."""
    save_by(STOCK, {"w": torch.ones(2)}, tmp_path / STOCK)
    save_by(WRITER, {"w": torch.ones(2)}, tmp_path / WRITER)
    assert "CheckpointException" in failure_of(load_by, STOCK, {"w": torch.ones(2)}, tmp_path / WRITER)
    assert "CheckpointException" in failure_of(load, {"w": torch.ones(2)}, checkpoint_id=tmp_path / WRITER)
    found = failure_of(load_by, WRITER, {"w": torch.ones(2)}, tmp_path / STOCK)
    assert str(tmp_path / STOCK) in found or "stock" in found
    assert not SafetensorsReader.validate_checkpoint_id(tmp_path / STOCK)


@pytest.mark.parametrize("path", ["s3://bucket/x", "file://x", "abc://abc.abc"])
def test_url_as_path_is_refused(path: str) -> None:
    """On purpose: stock DCP takes some of them, through fsspec."""
    for action in (
        lambda: AsyncCheckpointer().save({"w": torch.ones(1)}, path),
        lambda: SafetensorsWriter(path),
        lambda: SafetensorsReader(path),
    ):
        found = failure_of(action)
        assert "Error" in found
        assert path in found
    assert not SafetensorsWriter.validate_checkpoint_id(path)


class HalfPlanner(DefaultSavePlanner):
    """Saves tensors in bf16, as DCP's documentation shows."""

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        for item in plan.items:
            if item.tensor_data is not None:
                item.tensor_data.properties.dtype = torch.bfloat16
        return plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        found = super().resolve_data(write_item)
        return found if write_item.type == WriteItemType.BYTE_IO else found.to(torch.bfloat16)  # type: ignore[union-attr]


class PrefixPlanner(DefaultLoadPlanner):
    """Loads under other names than those in the checkpoint, as DCP's documentation shows."""

    def set_up_planner(self, state_dict: State, metadata: Any = None, is_coordinator: bool = False) -> None:
        renamed = {f"old.{name}": value for name, value in state_dict.items()}
        super().set_up_planner(renamed, metadata, is_coordinator)


def test_planners_of_users_work_with_reader_and_writer(tmp_path: Path) -> None:
    state = {"old": {"w": torch.arange(4.0) / 3, "v": torch.ones(2)}}
    for way in (STOCK, WRITER):
        save_by(way, dict(state), tmp_path / way, planner=HalfPlanner())
        target = {"w": torch.zeros(4).bfloat16(), "v": torch.zeros(2).bfloat16()}
        load_by(way, target, tmp_path / way, planner=PrefixPlanner())
        assert_same(target, {name: value.bfloat16() for name, value in state["old"].items()}, way)


def test_planner_without_flattening_as_stock(tmp_path: Path) -> None:
    state = {"flat": torch.ones(2), "number": 3, "text": "a"}
    for way in (STOCK, WRITER):
        save_by(way, dict(state), tmp_path / way, planner=DefaultSavePlanner(flatten_state_dict=False))
        target: State = {"flat": torch.zeros(2), "number": 0, "text": ""}
        # Both: a planner that flattens sharded tensors alone loads other leaves into a copy, and loses them.
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        load_by(way, target, tmp_path / way, planner=planner)
        assert_same(target, state, way)


@pytest.fixture
def empty_plan_cache() -> None:
    """Stock DCP keeps plans in class attributes, for the whole process."""
    for name in vars(SavePlanner):
        if name.startswith("_cached_"):
            getattr(SavePlanner, name).clear()


@pytest.mark.usefixtures("empty_plan_cache")
@pytest.mark.parametrize("way", [STOCK, WRITER])
def test_plan_caching_saves_new_values(tmp_path: Path, way: str) -> None:
    """Same plan, then another value, then another shape and name, then the first again."""
    states = [
        {"w": torch.ones(2), "n": 1},
        {"w": torch.zeros(2), "n": 2},
        {"w": torch.zeros(3), "m": 3},
        {"w": torch.ones(2), "n": 4},
    ]
    for number, state in enumerate(states):
        path = tmp_path / f"{way}{number}"
        save_by(way, dict(state), path, planner=DefaultSavePlanner(enable_plan_caching=True))
        target = blank(state)
        load_by(way, target, path)
        assert_same(target, state, f"{way}{number}")
        assert set(reader_of(way, path).read_metadata().state_dict_metadata) == set(state)


def training_state() -> State:
    """A nested state with tensors and leaves of other kinds."""
    return {
        "model": {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3).bfloat16()},
        "optimizer": {
            "state": {"w": {"exp_avg": torch.ones(2, 3), "step": torch.tensor(3.0)}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "foreach": None, "params": ["w", "b"]}],
        },
        "step": 7,
        "blob": b"bytes",
    }


def test_checkpoints_are_converted_to_and_from_stock(tmp_path: Path) -> None:
    """No model is needed: stock's to ours, ours to stock's, ours to ``torch.save``."""
    save_by(STOCK, training_state(), tmp_path / STOCK)
    for way in OURS:
        save_by(way, load_without_target(STOCK, tmp_path / STOCK), tmp_path / way)
        state = load_without_target(way, tmp_path / way)
        assert_same(state, training_state(), way)
        save_by(STOCK, state, tmp_path / f"{way}.back")
        assert_same(load_without_target(STOCK, tmp_path / f"{way}.back"), training_state(), way)
        torch.save(state, tmp_path / f"{way}.pt")
        assert_same(torch.load(tmp_path / f"{way}.pt", weights_only=True), training_state(), way)


def save_to_consolidate(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    full = torch.arange(35.0).reshape(7, 5)
    state = {
        "rows": distribute_tensor(full, mesh, [Shard(0)]),
        "columns": distribute_tensor(full, mesh, [Shard(1)]),
        "plain": full + 1,
    }
    for way in OURS:
        save_by(way, state, folder / way)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_consolidation_of_stock_reads_our_folder(tmp_path: Path) -> None:
    """``consolidate_safetensors_files`` makes whole tensors of our shard files."""
    run_ranks(save_to_consolidate, 2, tmp_path)
    full = torch.arange(35.0).reshape(7, 5)
    for way in OURS:
        (tmp_path / f"{way}.whole").mkdir()
        names = {"rows": 1, "columns": 1, "plain": 1}
        consolidate_safetensors_files(str(tmp_path / way), str(tmp_path / f"{way}.whole"), names)
        (file,) = (tmp_path / f"{way}.whole").glob("*.safetensors")
        assert_same(load_file(file), {"rows": full, "columns": full, "plain": full + 1}, way)


def asynchronous(folder: Path) -> None:
    """``dcp.async_save`` with our writer, in a thread and in a process; another coordinator."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))

    def state(value: float) -> State:
        full = torch.full((4, 3), value)
        return {
            "s": distribute_tensor(full, mesh, [Shard(0)]),
            "n": int(value),
            f"own.{rank}": full[0] + rank,
        }

    for kind in (AsyncCheckpointerType.THREAD, AsyncCheckpointerType.PROCESS):
        path = folder / kind.value
        saved = state(2.0)
        future = async_save(saved, storage_writer=SafetensorsWriter(path), async_checkpointer_type=kind)
        assert isinstance(future, Future)
        for tensor in (saved["s"].to_local(), saved[f"own.{rank}"]):
            tensor.zero_()
        future.result()
        dist.barrier()
        target = state(0.0)
        load_by(WRITER, target, path)
        assert_same(target, state(2.0), kind.value)
    save_state_dict(state(3.0), SafetensorsWriter(folder / "coordinator"), coordinator_rank=1)
    dist.barrier()
    target = state(0.0)
    load_by(WRITER, target, folder / "coordinator")
    assert_same(target, state(3.0))


def test_asynchronous_save_of_stock_uses_our_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", str(free_port()))  # the process of PROCESS joins a group of its own
    run_ranks(asynchronous, 2, tmp_path)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
