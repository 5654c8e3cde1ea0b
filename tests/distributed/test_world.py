"""Ranks from the environment, and how ranks decide together."""

from __future__ import annotations

import os

import pytest
import torch.distributed as dist
from support.ranks import run_ranks

from kempnerforge.distributed.consensus import ControlGroup
from kempnerforge.distributed.context import DistributedContext, RankInfo, find_rank_info
from kempnerforge.errors import ConfigError, ConfigIssue, DataError, KempnerForgeError

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, RankInfo(0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, RankInfo(5, 8, 1)),
        (
            {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"},
            RankInfo(3, 4, 1),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, RankInfo(0, 1, 0)),
        (
            {
                "RANK": "1",
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "1",
                "SLURM_PROCID": "0",
                "SLURM_STEP_NUM_TASKS": "2",
            },
            RankInfo(1, 2, 1),
        ),
    ],
)
def test_find_rank_info_prefers_torchrun_then_srun(env: dict[str, str], expected: RankInfo) -> None:
    assert find_rank_info(env) == expected


def alone_agrees() -> None:
    control = ControlGroup(None)
    assert control.agree([0, 3]) == [0, 3]
    assert control.gather("x") == ["x"]
    assert control.run_on_rank0(lambda: 5) == 5
    control.raise_on_any_error(None)


def test_control_group_alone_agrees_with_itself() -> None:
    assert not dist.is_initialized()
    alone_agrees()


def decide_together() -> list[object]:
    rank = dist.get_rank()
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    control = ControlGroup(group)
    heard: list[object] = [control.agree([rank, 0, 7 - rank]), control.run_on_rank0(lambda: f"from {rank}")]
    for error in (DataError("bad shard"), ConfigError([ConfigIssue("a.b", "is wrong")], where="x.toml")):
        with pytest.raises(type(error)) as caught:
            control.raise_on_any_error(error if rank == 1 else None)
        assert str(caught.value) == str(error)
        assert caught.value.agreed
    # An error that is not ours stays what it is where it happened, and is quoted elsewhere.
    expected, text = (RuntimeError, "rank 1: ValueError") if rank == 0 else (ValueError, "no")
    with pytest.raises(expected, match=text):
        control.raise_on_any_error(ValueError("no") if rank == 1 else None)

    def fail() -> None:
        raise KempnerForgeError("only rank 0 ran this")

    with pytest.raises(KempnerForgeError, match="only rank 0"):
        control.run_on_rank0(fail)
    heard.append(control.gather(rank * 10))
    return heard


def test_control_group_shares_maxima_results_errors() -> None:
    assert run_ranks(decide_together, 2) == [[[1, 0, 7], "from 0", [0, 10]]] * 2


def start_world() -> tuple[int, int, list[int]]:
    dist.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        os.environ.pop(name, None)
    world = DistributedContext.start(timeout_s=30)
    try:
        return world.rank, world.num_ranks, world.control.agree([4])
    finally:
        world.close()


def test_world_single_process_needs_no_launcher() -> None:
    assert run_ranks(start_world, 1) == [(0, 1, [4])]
