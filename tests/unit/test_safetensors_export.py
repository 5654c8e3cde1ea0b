"""``ckpt export --format safetensors``: the tensors of any model, under its own names."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.ckpt_cli import Ckpt
from support.step_maker import write_step

pytest_plugins = ["support.ckpt_fixtures"]

OWN = '[model]\nname = "outside:Model"\nargs = { width = 3 }\n'
STATE = {
    "model.conv.weight": np.arange(4 * 3 * 2 * 5, dtype=np.float32).reshape(4, 3, 2, 5),
    "model.linear.weight": np.arange(35, dtype=np.float32).reshape(5, 7),
    "model.norm.running_mean": np.arange(6, dtype=np.float64),
    "model.norm.num_batches_tracked": np.array(17, dtype=np.int64),
    "optimizer.conv.weight.exp_avg": np.zeros((4, 3), dtype=np.float32),
}


def cut(name: str, dims: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Boxes (offsets, sizes) that cut an array into two uneven parts in each of ``dims``."""
    shape = STATE[name].shape
    parts = [[(0, 1), (1, size - 1)] if dim in dims else [(0, size)] for dim, size in enumerate(shape)]
    return [tuple(zip(*choice, strict=True)) for choice in itertools.product(*parts)]  # type: ignore[misc]


@pytest.mark.parametrize("dims", [(), (0,), (1,), (3,), (0, 2), (1, 3), (0, 1, 2, 3)])
def test_export_own_names_from_any_cut(ckpt: Ckpt, tmp_path: Path, dims: tuple[int, ...]) -> None:
    boxes = {name: cut(name, dims) for name in STATE if STATE[name].ndim > 1}
    step = write_step(tmp_path, 7, state=STATE, boxes=boxes, config=OWN)
    done = ckpt("export", step, "--out", tmp_path / "out", "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out)["format"] == "safetensors"
    found = load_file(tmp_path / "out" / "model.safetensors")
    wanted = {name: array for name, array in STATE.items() if name.startswith("model.")}
    assert {f"model.{name}" for name in found} == wanted.keys()
    for name, array in wanted.items():
        tensor = found[name.removeprefix("model.")]
        assert tensor.dtype == torch.from_numpy(np.atleast_1d(array)).dtype
        assert np.array_equal(tensor.numpy(), array)


def test_export_own_names_casts_floats_only(ckpt: Ckpt, tmp_path: Path) -> None:
    step = write_step(tmp_path, 7, state=STATE, config=OWN)
    out = tmp_path / "out"
    assert ckpt("export", step, "--out", out, "--dtype", "bf16", "--max-shard-size", "300").status == 0
    where = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(where.values())) > 1
    found = {name: load_file(out / file)[name] for name, file in where.items()}
    assert found["conv.weight"].dtype == torch.bfloat16
    assert torch.equal(found["conv.weight"].float(), torch.from_numpy(STATE["model.conv.weight"]))
    assert found["norm.running_mean"].dtype == torch.float64
    assert found["norm.num_batches_tracked"].item() == 17


def test_export_own_model_as_hf_is_refused(ckpt: Ckpt, tmp_path: Path) -> None:
    step = write_step(tmp_path, 7, state=STATE, config=OWN)
    done = ckpt("export", step, "--out", tmp_path / "out", "--format", "hf")
    assert done.status == 2
    assert "its model is outside:Model. Use --format safetensors" in done.err
    without = write_step(tmp_path / "x", 7, state={"optimizer.a": STATE["model.linear.weight"]}, config=OWN)
    done = ckpt("export", without, "--out", tmp_path / "out")
    assert done.status == 2
    assert "has no tensors under model" in done.err
    assert not (tmp_path / "out").exists()
