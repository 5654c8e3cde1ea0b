"""A save changes nothing: not the losses, whenever it happens, and not what others can read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from support.run_files import digest_of, tensor_digests
from support.runs import Launcher, make_run
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, zeros

from kempnerforge.checkpoint.load.dcp_reader import SafetensorsReader

pytest_plugins = ["support.run_fixtures"]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.smoke)])
def test_saves_at_every_step_or_never_log_same_bits(
    launcher: Launcher, corpus: Path, tmp_path: Path, ranks: int
) -> None:
    always = make_run(tmp_path / "always", corpus, **{"checkpoint.interval": 1, "checkpoint.keep_last_n": 1})
    launcher.finish(always, ranks=ranks)
    never = make_run(tmp_path / "never", corpus, **{"checkpoint.interval": 0, "checkpoint.save_last": False})
    launcher.finish(never, ranks=ranks)
    assert sum("checkpoint/step" in row for row in always.rows()) == 12
    assert always.sound() == [12]
    assert not any("checkpoint/step" in row for row in never.rows())
    assert never.names() == {"owner.json"}
    assert sorted(always.counting()) == list(range(13))
    assert always.counting() == never.counting()


@pytest.mark.parametrize("ranks", [1, 2])
def test_resume_finished_run_matches_longer_run_bitwise(
    launcher: Launcher, corpus: Path, tmp_path: Path, ranks: int
) -> None:
    settings = {"eval.interval": 3, "scheduler.name": "constant"}
    twice = make_run(tmp_path / "twice", corpus, **settings, **{"train.max_steps": 6})
    launcher.finish(twice, ranks=ranks)
    launcher.finish(twice, "--train.max_steps=12", ranks=ranks)
    once = make_run(tmp_path / "once", corpus, **settings, **{"train.max_steps": 12})
    launcher.finish(once, ranks=ranks)
    assert [receipt["step"] for receipt in twice.receipts()] == [0, 6]
    assert twice.counting() == once.counting()
    assert tensor_digests(twice.step_folder(12)) == tensor_digests(once.step_folder(12))


def test_resume_finished_run_unchanged_trains_nothing(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path, corpus)
    launcher.finish(run, ranks=2)
    names, before = run.names(), tensor_digests(run.step_folder(12))
    trained = [row for row in run.rows() if "train/loss" in row]
    launcher.finish(run, ranks=2)
    assert [row for row in run.rows() if "train/loss" in row] == trained
    assert run.names() == names
    assert tensor_digests(run.step_folder(12)) == before


def load_with_stock_dcp(step_folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Digests of all tensors, read by stock DCP whole, and read in parts and put together."""
    reader = SafetensorsReader(step_folder)
    shapes = {
        name: (meta.size, meta.properties.dtype)
        for name, meta in reader.read_metadata().state_dict_metadata.items()
        if isinstance(meta, TensorStorageMetadata)
    }
    whole = {name: torch.zeros(size, dtype=dtype) for name, (size, dtype) in shapes.items()}
    load(whole, storage_reader=HuggingFaceStorageReader(str(step_folder)))

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parts = {
        name: zeros(size, dtype=dtype, device_mesh=mesh, placements=[Shard(0)])
        for name, (size, dtype) in shapes.items()
        if len(size)
    }
    load(parts, storage_reader=HuggingFaceStorageReader(str(step_folder)))
    assert all(isinstance(tensor, DTensor) for tensor in parts.values())
    return (
        {name: digest_of(tensor) for name, tensor in whole.items()},
        {name: digest_of(tensor.full_tensor()) for name, tensor in parts.items()},
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_stock_dcp_reads_tensors_of_run(launcher: Launcher, corpus: Path, tmp_path: Path, ranks: int) -> None:
    run = make_run(tmp_path, corpus, **{"train.max_steps": 3})
    launcher.finish(run, ranks=ranks)
    ours = tensor_digests(run.step_folder(3))
    assert len(ours) > 60
    for whole, parts in run_ranks(load_with_stock_dcp, 2, run.step_folder(3)):
        assert whole == ours
        assert parts == {name: ours[name] for name in parts}
        assert len(parts) > 40
