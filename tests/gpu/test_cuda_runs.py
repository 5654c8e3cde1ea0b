"""Whole training runs on a CUDA device, and NCCL's groups. One GPU, one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.runs import Run, make_run

pytest_plugins = ["support.run_fixtures"]
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

REPO = Path(__file__).parents[2]
LAUNCHED_BY = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python as one process on its own, as no launcher had started it."""
    env = {key: value for key, value in os.environ.items() if key not in LAUNCHED_BY}
    env = {key: value for key, value in env.items() if not key.startswith("SLURM_")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**env, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def train(run: Run, max_steps: int) -> None:
    ended = python(
        str(REPO / "scripts/train.py"),
        f"--config={run.config}",
        f"--train.max_steps={max_steps}",
        cwd=run.base,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_cuda_run_stopped_and_resumed_is_bitwise_equal(corpus: Path, tmp_path: Path) -> None:
    settings = {
        "train.deterministic": True,
        "checkpoint.async_mode": "async_with_pinned_mem",
        "checkpoint.interval": 2,
    }
    whole = make_run(tmp_path / "whole", corpus, **settings)
    parts = make_run(tmp_path / "parts", corpus, **settings)
    train(whole, 12)
    for until in (4, 8, 12):
        train(parts, until)
    assert [receipt["step"] for receipt in parts.receipts()] == [0, 4, 8]
    ours, theirs = parts.counting(), whole.counting()
    assert sorted(step for step in ours if "train/loss" in ours[step]) == list(range(1, 13))
    for step in range(1, 13):
        for key in ("train/loss", "train/grad_norm", "data/digest"):
            assert repr(ours[step][key]) == repr(theirs[step][key]), (step, key)


GROUPS = """
import json, torch, torch.distributed as dist
from torch.distributed.distributed_c10d import _world
from kempnerforge.distributed import timeouts
from kempnerforge.distributed.mesh import build_mesh
from kempnerforge.distributed.context import World

world = World.start(timeout_s=83)
before = dist.new_group([0])
mesh = build_mesh(world.device.type, dp_replicate=1, dp_shard=1)
total = torch.ones(2, device=world.device)
dist.all_reduce(total, group=before)
found = {}
for group in _world.pg_map:
    for device in group._device_types:
        options = group._get_backend(device).options
        found[f"{group.group_desc} {group.group_name} on {device}"] = options._timeout.total_seconds()
world.close()
print(json.dumps(found))
"""


def test_cuda_groups_of_nccl_have_the_timeout(tmp_path: Path) -> None:
    ended = python("-c", GROUPS, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    assert len(found) >= 3
    assert sum("cuda" in name for name in found) >= 2
    assert set(found.values()) == {83.0}, found
