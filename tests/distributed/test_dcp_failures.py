"""Failures on one rank, mutation after a save, subsets of ranks: beside stock DCP, on real ranks."""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

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
    reader_of,
    save_by,
)
from support.ranks import run_ranks
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from kempnerforge import AsyncCheckpointer, SafetensorsWriter

SAVE_STAGES = ("set_up_planner", "create_local_plan", "create_global_plan", "finish_plan", "resolve_data")
LOAD_STAGES = ("set_up_planner", "create_local_plan", "create_global_plan", "finish_plan", "resolve_tensor")


def fail_here(stage: str, at: str, rank: int) -> None:
    """Raise if this is the stage and the rank that shall fail."""
    if stage == at and dist.get_rank() == rank:
        raise ValueError(f"{stage} fails on rank {rank}")


class FailingSavePlanner(DefaultSavePlanner):
    """Fails at one stage on one rank."""

    def __init__(self, at: str, rank: int) -> None:
        super().__init__()
        self._fail: Callable[[str], None] = lambda stage: fail_here(stage, at, rank)

    def set_up_planner(
        self, state_dict: State, storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        self._fail("set_up_planner")
        super().set_up_planner(state_dict, storage_meta, is_coordinator)

    def create_local_plan(self) -> SavePlan:
        self._fail("create_local_plan")
        return super().create_local_plan()

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        self._fail("create_global_plan")
        return super().create_global_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        self._fail("finish_plan")
        return super().finish_plan(new_plan)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        self._fail("resolve_data")
        return super().resolve_data(write_item)


class FailingLoadPlanner(DefaultLoadPlanner):
    """Fails at one stage on one rank."""

    def __init__(self, at: str, rank: int) -> None:
        super().__init__()
        self._fail: Callable[[str], None] = lambda stage: fail_here(stage, at, rank)

    def set_up_planner(self, state_dict: State, metadata: Any = None, is_coordinator: bool = False) -> None:
        self._fail("set_up_planner")
        super().set_up_planner(state_dict, metadata, is_coordinator)

    def create_local_plan(self) -> LoadPlan:
        self._fail("create_local_plan")
        return super().create_local_plan()

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        self._fail("create_global_plan")
        return super().create_global_plan(global_plan)

    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        self._fail("finish_plan")
        return super().finish_plan(new_plan)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        self._fail("resolve_tensor")
        return super().resolve_tensor(read_item)


def sharded_state(value: float) -> State:
    """A sharded tensor, a plain one and a number."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    full = torch.arange(12.0).reshape(6, 2) * value
    return {"s": distribute_tensor(full, mesh, [Shard(0)]), "plain": full + 1, "n": int(value)}


def fail_at_each_stage(folder: Path) -> None:
    """A stage fails on one rank: the same exception on all; then the save to the same path works."""
    for way in (STOCK, WRITER):
        for stage in SAVE_STAGES:
            # Only the coordinator makes the global plan.
            rank = 0 if stage == "create_global_plan" else 1
            path = folder / f"{way}.{stage}"
            planner = FailingSavePlanner(stage, rank)
            found = failure_of(save_by, way, sharded_state(2.0), path, planner=planner)
            wanted = f"CheckpointException {{{rank}: ('ValueError', '{stage} fails on rank {rank}')}}"
            assert found == wanted, f"{way} {found}"
            if way == WRITER:
                assert not path.exists()
            dist.barrier()
            save_by(way, sharded_state(2.0), path)
            target = sharded_state(0.0)
            load_by(way, target, path)
            assert_same(target, sharded_state(2.0), f"{way} {stage}")
        for stage in LOAD_STAGES:
            rank = 0 if stage == "create_global_plan" else 1
            planner = FailingLoadPlanner(stage, rank)
            path = folder / f"{way}.{SAVE_STAGES[0]}"
            found = failure_of(load_by, way, sharded_state(0.0), path, planner=planner)
            assert f"{stage} fails on rank {rank}" in found, f"{way} {found}"


def test_failure_of_one_rank_at_each_stage_reaches_all(tmp_path: Path) -> None:
    run_ranks(fail_at_each_stage, 2, tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


class Failing:
    """A Stateful that fails on rank 1, when it is saved or when it is loaded."""

    def __init__(self, at: str) -> None:
        self._at = at

    def state_dict(self) -> State:
        fail_here("state_dict", self._at, 1)
        return {"w": torch.ones(2)}

    def load_state_dict(self, state_dict: State) -> None:
        del state_dict


BAD_LEAVES: dict[str, Callable[[], Any]] = {
    "meta": lambda: torch.empty(2, device="meta"),
    "sparse": lambda: torch.ones(2).to_sparse(),
    "partial": lambda: DTensor.from_local(torch.ones(2), init_device_mesh("cpu", (2,)), [Partial()]),
    "path": lambda: Path("/"),
}


def bad_leaves(folder: Path) -> None:
    """A leaf that rank 1 alone cannot save is named on all ranks, before anything is written.

    DCP does not show our writer the plain tensors of rank 1 that rank 0 has too.
    """
    rank = dist.get_rank()
    for way in OURS:
        for kind, make in BAD_LEAVES.items():
            leaf = make()  # by every rank, because making a mesh is collective
            bad = rank == 1 or kind == "partial" or way == WRITER
            state = {"sub": {"leaf": leaf if bad else torch.ones(2)}}
            path = folder / f"{way}.{kind}"
            found = failure_of(save_by, way, state, path)
            if (way, kind) == (WRITER, "partial"):  # DCP's own planner refuses it, and does not name it
                assert "partial placements" in found
            else:
                assert "TypeError" in found, f"{way} {kind} {found}"
                assert "sub.leaf" in found, f"{way} {kind} {found}"
            dist.barrier()
            # The writer learns of it only when it is given the tensors: the next save removes what it left.
            left = [path.name for path in folder.iterdir()]
            assert [name for name in left if way != WRITER or name[0] != "."] == [], way
            dist.barrier()
    for way in MODES:
        found = failure_of(save_by, way, {"f": Failing("state_dict")}, folder / way)
        assert "state_dict fails on rank 1" in found
        assert "rank 1" in found


def test_bad_leaf_of_one_rank_is_named_on_all(tmp_path: Path) -> None:
    run_ranks(bad_leaves, 2, tmp_path)


def targets_that_do_not_fit(folder: Path) -> None:
    """Rank 1 asks for a missing key, another shape or another dtype: all ranks raise, and name the rank."""
    rank = dist.get_rank()
    wrong: dict[str, State] = {
        "missing": {"plain": torch.zeros(6, 2), "x": torch.zeros(1)},
        "shape": {"plain": torch.zeros(2, 6)},
        "dtype": {"plain": torch.zeros(6, 2, dtype=torch.int32)},
    }
    for way in (STOCK, "disabled", WRITER):
        save_by(way, sharded_state(2.0), folder / way)
        for kind, target in wrong.items():
            mine: State = target if rank == 1 else {"plain": torch.zeros(6, 2)}
            found = failure_of(load_by, way, dict(mine), folder / way)
            if (way, kind) == (STOCK, "dtype"):
                assert found == "nothing"
            else:
                assert found.startswith("CheckpointException {1: "), f"{way} {kind} {found}"
                assert ("plain" in found) or ("Missing key in checkpoint state_dict: x" in found)


def test_target_of_one_rank_that_does_not_fit_fails_on_all(tmp_path: Path) -> None:
    run_ranks(targets_that_do_not_fit, 2, tmp_path)


def damage_what_one_rank_reads(folder: Path) -> None:
    """A flipped byte in the file of rank 1: all ranks raise; stock DCP loads it."""
    rank = dist.get_rank()
    for way in (STOCK, "async", WRITER):
        path = folder / way
        save_by(way, sharded_state(2.0), path)
        if rank == 0:
            pattern = "__1_0.distcp" if way == STOCK else "shard_00001_*"
            (file,) = path.glob(pattern)
            data = bytearray(file.read_bytes())
            data[data.find(torch.arange(6.0, 12.0).mul(2).numpy().tobytes()) + 3] ^= 0x01
            file.write_bytes(data)
        dist.barrier()
        target = {"s": sharded_state(0.0)["s"]}
        found = failure_of(load_by, way, target, path)
        if way == STOCK:
            assert found == "nothing"
        else:
            assert "DamagedCheckpointError" in found
            assert f"{way} is damaged: shard_00001" in found


def test_flipped_byte_is_found_on_all_ranks(tmp_path: Path) -> None:
    """On purpose: stock DCP loads the wrong value in silence."""
    run_ranks(damage_what_one_rank_reads, 2, tmp_path)


def leaves_of_single_ranks(folder: Path) -> None:
    """Union of the keys of all ranks; what all have and is not the same comes from one rank, whole."""
    rank = dist.get_rank()
    for way in WAYS:
        state: State = {
            "shared": {"text": "same"},
            f"own.{rank}": {"text": f"of {rank}", "w": torch.full((3,), float(rank))},
            "differs": {"rank": rank, "list": [rank, rank]},
        }
        if rank == 1:
            state["only_1"] = [b"x", (1, None)]
        save_by(way, state, folder / way)


def test_leaves_of_single_ranks_are_all_there(tmp_path: Path) -> None:
    run_ranks(leaves_of_single_ranks, 2, tmp_path)
    wanted = {
        "shared": {"text": "same"},
        **{f"own.{rank}": {"text": f"of {rank}", "w": torch.full((3,), float(rank))} for rank in range(2)},
        "only_1": [b"x", (1, None)],
    }
    for way in WAYS:
        found = load_without_target(way, tmp_path / way)
        differs = found.pop("differs")
        assert differs["rank"] in (0, 1), way
        assert len(set(differs["list"])) == 1, way
        assert_same(found, wanted, way)


def kinds_that_differ(folder: Path) -> None:
    """A name that is a tensor on one rank and a number on the other: one of the two, or refused by name."""
    rank = dist.get_rank()
    for way in OURS:
        for tensor_rank in range(2):
            path = folder / f"{way}{tensor_rank}"
            state: State = {"x": torch.ones(2) if rank == tensor_rank else 5, "w": torch.ones(2)}
            found = failure_of(save_by, way, state, path)
            dist.barrier()
            if way == WRITER and found == "nothing":
                loaded = load_without_target(way, path)["x"]
                assert loaded == 5 if isinstance(loaded, int) else torch.equal(loaded, torch.ones(2)), way
            else:
                # For our writer DCP's own planner refuses it, and names nothing.
                assert "x is a tensor on rank" in found or way == WRITER, f"{way} {tensor_rank} {found}"
                assert not path.exists()


def test_name_of_two_kinds_is_one_ranks_or_refused(tmp_path: Path) -> None:
    run_ranks(kinds_that_differ, 2, tmp_path)


def save_existing(folder: Path) -> None:
    """A path that exists is refused on all ranks."""
    for way in OURS:
        save_by(way, sharded_state(1.0), folder / way)
        dist.barrier()
        found = failure_of(save_by, way, sharded_state(2.0), folder / way)
        assert "SaveFailedError" in found, way
        assert "never replaced" in found, way
        target = sharded_state(0.0)
        load_by(way, target, folder / way)
        assert_same(target, sharded_state(1.0), way)


def test_save_over_checkpoint_is_refused_on_all_ranks(tmp_path: Path) -> None:
    run_ranks(save_existing, 2, tmp_path)


def change(state: State) -> None:
    """Change all tensors in place, as an optimizer does."""
    for tensor in state.values():
        if isinstance(tensor, torch.Tensor):
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            local.mul_(-3)
    state["n"] = -1


def saves_in_a_row(folder: Path) -> None:
    """Three saves after each other, each followed by a mutation: each has the values at its ``save``."""
    for way in (STOCK, *OURS):
        checkpointer = AsyncCheckpointer(way) if way in MODES else None
        pending: list[Future[Any]] = []
        for step in range(1, 4):
            state, path = sharded_state(float(step)), folder / f"{way}{step}"
            if checkpointer is not None:
                checkpointer.save(state, path)
            elif way == WRITER:
                # Stock's asynchronous save with our writer.
                pending.append(_future(async_save(state, storage_writer=SafetensorsWriter(path))))
            else:
                pending.append(_future(async_save(state, checkpoint_id=path)))
            change(state)
            for future in pending:
                future.result()
            pending.clear()
        if checkpointer is not None:
            checkpointer.wait()
            checkpointer.close()
        dist.barrier()
        for step in range(1, 4):
            target = sharded_state(0.0)
            load_by(way, target, folder / f"{way}{step}")
            assert_same(target, sharded_state(float(step)), f"{way}{step}")


def _future(response: Any) -> Future[Any]:
    assert isinstance(response, Future)
    return response


@pytest.mark.smoke
def test_saves_in_a_row_have_the_values_at_their_save(tmp_path: Path) -> None:
    run_ranks(saves_in_a_row, 2, tmp_path)


def subset(folder: Path) -> None:
    """Ranks 1 and 2 of three save and load; rank 0 takes no part."""
    group = dist.new_group([1, 2], backend="gloo")
    rank = dist.get_rank()
    if rank:
        assert isinstance(group, dist.ProcessGroup)
        for way in WAYS:
            state: State = {f"r{rank}": torch.full((3,), float(rank)), "both": torch.ones(2), "n": 4}
            save_by(way, state, folder / way, group)
            target = {f"r{rank}": torch.zeros(3), "both": torch.zeros(2), "n": 0}
            load_by(way, target, folder / way, group)
            assert_same(target, state, way)


def test_subset_of_ranks_saves_and_loads(tmp_path: Path) -> None:
    run_ranks(subset, 3, tmp_path)
    wanted = {"r1": torch.ones(3), "r2": torch.full((3,), 2.0), "both": torch.ones(2), "n": 4}
    for way in WAYS:
        assert_same(load_without_target(way, tmp_path / way), wanted, way)


class BalancingPlanner(DefaultSavePlanner):
    """Deals the items of rank 0 out to all ranks, as DCP's documentation shows for DDP."""

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        items = all_plans[0].items
        dealt = [
            SavePlan(items[rank :: len(all_plans)], planner_data=plan.planner_data)
            for rank, plan in enumerate(all_plans)
        ]
        return super().create_global_plan(dealt)


def planners(folder: Path) -> None:
    """Cached plans, of which one rank's changes; items dealt out; duplicates saved by the lowest rank."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))

    def state(step: int) -> State:
        made: State = {"s": distribute_tensor(torch.full((4, 2), float(step)), mesh, [Shard(0)]), "n": step}
        made[f"own.{rank}"] = torch.full((step if step > 2 and rank == 1 else 2,), float(step + rank))
        return made

    for way in (STOCK, WRITER):
        for name in vars(SavePlanner):
            if name.startswith("_cached_"):
                getattr(SavePlanner, name).clear()
        for step in range(1, 5):
            path = folder / f"cached.{way}{step}"
            save_by(way, state(step), path, planner=DefaultSavePlanner(enable_plan_caching=True))
            target = state(step)
            for tensor in target.values():
                if isinstance(tensor, torch.Tensor):
                    (tensor.to_local() if isinstance(tensor, DTensor) else tensor).zero_()
            target["n"] = 0
            load_by(way, target, path)
            assert_same(target, state(step), f"{way}{step}")
        plain: State = {f"t{number}": torch.full((8,), float(number)) for number in range(4)} | {"n": 3}
        for name, planner in (
            ("dealt", BalancingPlanner()),
            ("lowest", DefaultSavePlanner(dedup_save_to_lowest_rank=True)),
        ):
            save_by(way, plain, folder / f"{name}.{way}", planner=planner)
            if rank == 0:
                assert_same(_read_alone(way, folder / f"{name}.{way}"), plain, f"{name} {way}")


def _read_alone(way: str, path: Path) -> State:
    target: State = {f"t{number}": torch.zeros(8) for number in range(4)} | {"n": 0}
    load(target, storage_reader=reader_of(way, path), no_dist=True)
    return target


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_planners_of_two_ranks_save_as_stock(tmp_path: Path) -> None:
    run_ranks(planners, 2, tmp_path)
    files = {
        way: sorted(path.name for path in (tmp_path / f"dealt.{way}").iterdir()) for way in (STOCK, WRITER)
    }
    assert {"__0_0.distcp", "__1_0.distcp"} <= set(files[STOCK])
    assert {"shard_00000_of_00002.safetensors", "shard_00001_of_00002.safetensors"} <= set(files[WRITER])
