"""FSDP1: its DTensors, its ShardedTensors and its own optimizer state dicts, beside stock DCP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from support import dcp_models
from support.dcp_models import ONE_WAY, Training, load_everywhere, local, resume_on_all
from support.dcp_pairs import STOCK, WAYS, assert_same, load_by, reader_of, save_by
from support.ranks import run_ranks
from torch.distributed.checkpoint.optimizer import load_sharded_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning")]


def test_fsdp1_trains_on_after_a_load(tmp_path: Path) -> None:
    """With a mesh, without one, and hybrid; then FSDP2 and one rank load what they saved."""
    two, four = ["fsdp1", "fsdp1_without_mesh"], ["fsdp1_hybrid"]
    run_ranks(resume_on_all, 2, two, tmp_path, ONE_WAY)
    run_ranks(resume_on_all, 4, four, tmp_path, ONE_WAY)
    alone = load_everywhere(["alone"], two + four, tmp_path, ONE_WAY)
    for found in run_ranks(load_everywhere, 2, ["fsdp2"], two + four, tmp_path, ONE_WAY):
        assert_same(found, alone)
    assert_same(alone[len(two + four) :], alone[: len(two + four)] * (len(ONE_WAY) - 1))


def own_state_dicts(folder: Path) -> list[dict[str, Any]]:
    """``FSDP.optim_state_dict`` saved, loaded by ``load_sharded_optimizer_state_dict``, trained on."""
    found = []
    training = Training(dcp_models.fsdp1_without_mesh)
    training.train(2)

    def state_of(training: Training) -> dict[str, Any]:
        with FullyShardedDataParallel.state_dict_type(training.model, StateDictType.SHARDED_STATE_DICT):
            optimizer = FullyShardedDataParallel.optim_state_dict(training.model, training.optimizer)
            return {"model": training.model.state_dict(), "optimizer": optimizer}

    for way in WAYS:
        save_by(way, state_of(training), folder / way)
    losses = training.train(2)
    for way in WAYS:
        resumed = Training(dcp_models.fsdp1_without_mesh, seed=2)
        with FullyShardedDataParallel.state_dict_type(resumed.model, StateDictType.SHARDED_STATE_DICT):
            model = resumed.model.state_dict()
            load_by(way, {"model": model}, folder / way)
            resumed.model.load_state_dict(model)
            loaded = load_sharded_optimizer_state_dict(model, "optimizer", reader_of(way, folder / way))
            found.append(local(loaded))
            to_load = FullyShardedDataParallel.optim_state_dict_to_load(
                resumed.model, resumed.optimizer, loaded["optimizer"]
            )
        resumed.optimizer.load_state_dict(to_load)
        resumed.step = 2
        assert resumed.train(2) == losses, way
        assert_same(state_of(resumed), state_of(training), way)
    dist.barrier()
    return found


def test_fsdp1_own_optimizer_states_come_back(tmp_path: Path) -> None:
    for stock, *ours in run_ranks(own_state_dicts, 2, tmp_path):
        for way, found in zip(WAYS[1:], ours, strict=True):
            assert_same(found, stock, f"{STOCK} and {way}")
