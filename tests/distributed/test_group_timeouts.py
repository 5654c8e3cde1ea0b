"""``distributed.timeout_s`` holds for every process group that there is."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from support.runs import Launcher, make_run
from torch.distributed.distributed_c10d import _world

from kempnerforge import AsyncCheckpointer
from kempnerforge.distributed import timeouts

pytest_plugins = ["support.run_fixtures"]

LAYOUTS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "tp": ({"distributed.tp": 2, "model.vocab_size": 258}, {"mesh_tp"}),
    "pp": ({"distributed.pp": 2}, {"mesh_pp"}),
    "hsdp": ({"distributed.dp_replicate": 2}, {"mesh_dp_replicate", "mesh_dp_shard"}),
}
"""Settings for 4 ranks, and groups that there must be."""


@pytest.mark.parametrize("layout", [*LAYOUTS])
def test_groups_of_a_run_all_have_its_timeout(
    layout: str, launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    settings, wanted = LAYOUTS[layout]
    run = make_run(tmp_path, corpus, **{"train.max_steps": 4, "distributed.timeout_s": 83.0, **settings})
    report = ("report_group_timeouts", {"path": str(tmp_path / "groups")})
    ended = launcher.run(run, ranks=4, faults=[report])
    assert ended.statuses == [0] * 4, ended.output
    for rank in range(4):
        after_set_up, at_the_end = json.loads((tmp_path / f"groups.rank_{rank}.json").read_text())
        assert {name.split()[0] for name in at_the_end} >= {"default_pg", *wanted}
        assert len(after_set_up) >= 3
        assert set(after_set_up.values()) == set(at_the_end.values()) == {83.0}, at_the_end


def save_with_own_groups(folder: str) -> list[float]:
    """Save over all ranks and over each pair of them, in groups that the checkpointer makes."""
    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=71))
    pair = dist.new_group([0, 1], timeout=datetime.timedelta(seconds=67))
    assert isinstance(pair, dist.ProcessGroup)
    assert timeouts.timeout_of(pair) == datetime.timedelta(seconds=67)
    with AsyncCheckpointer("async") as checkpointer:
        checkpointer.save({"w": torch.ones(3)}, f"{folder}/all")
    return sorted(
        group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in _world.pg_map
    )


@pytest.mark.smoke
def test_checkpointer_own_group_waits_as_default_group(tmp_path: Path) -> None:
    """Also for loops of users' own, where nothing else of ours makes groups. Theirs are left alone."""
    assert run_ranks(save_with_own_groups, 2, str(tmp_path)) == [[67.0, 71.0, 71.0]] * 2
