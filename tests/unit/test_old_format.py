"""Checkpoints that the first version of format 1 wrote load as they did (tests/data/format1/README.md)."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from support.state_trees import same
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys, load

from kempnerforge.checkpoint.format import manifest
from kempnerforge.checkpoint.format.safetensors_file import ShardItem
from kempnerforge.checkpoint.load.dcp_reader import SafetensorsReader
from kempnerforge.checkpoint.manager import CheckpointManager
from kempnerforge.checkpoint.save.commit import ExpectedFiles, PlannedFile, PlannedItem
from kempnerforge.checkpoint.state.train_state import TrainState
from kempnerforge.checkpoint.tools.verify import verify
from kempnerforge.config.schema import CheckpointConfig
from kempnerforge.errors import MismatchError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed")

DATA = Path(__file__).parents[1] / "data" / "format1"
WEIGHTS = {
    "0.weight": [
        [-0.029949484393000603, 0.09501301497220993, 0.21997550129890442],
        [0.3449201285839081, 0.469882607460022, 0.5948450565338135],
    ],
    "0.bias": [0.09501301497220993, 0.21995759010314941],
    "1.weight": [[0.2200106382369995, 0.34491196274757385]],
    "1.bias": [0.3448905348777771],
}
MOMENTS = {
    "0.bias": ([0.06484504044055939, 0.09871481359004974], [0.00017279302119277418, 0.00039938490954227746]),
    "1.bias": ([0.2709999978542328], [0.0029970011673867702]),
}
NESTED: dict[str, Any] = {
    "net.w": torch.arange(6.0).reshape(2, 3),
    "net.layers.0": torch.ones(2),
    "net.layers.1.half": torch.tensor([1.5]).bfloat16(),
    "epoch": 4,
    "pair": (1, float("inf")),
    "raw.x": b"\x00\xff",
    "tags": {"a", "b"},
    "names": ["p", "q"],
}


def test_old_step_of_a_run_is_resumed_exactly(tmp_path: Path) -> None:
    shutil.copytree(DATA / "step_00000003", tmp_path / "checkpoints" / "step_00000003")
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    state = TrainState(model=model, optimizer=optimizer, seed=5)
    config = CheckpointConfig.model_validate({"interval": 0, "save_last": False})
    with CheckpointManager(config, state=state, run_dir=tmp_path) as ckpt:
        ckpt.resume(state)
    assert (state.step, state.tokens, state.cursor) == (3, 21, {"samples": 3})
    assert {name: tensor.tolist() for name, tensor in model.state_dict().items()} == WEIGHTS
    for name, parameter in model.named_parameters():
        moments = optimizer.state[parameter]
        assert float(moments["step"]) == 3
        if name in MOMENTS:
            assert (moments["exp_avg"].tolist(), moments["exp_avg_sq"].tolist()) == MOMENTS[name]


def test_old_state_dict_loads_with_and_without_target() -> None:
    found = _load_state_dict_from_keys(storage_reader=SafetensorsReader(DATA / "nested"))
    assert found.keys() == NESTED.keys()
    assert all(same(found[name], NESTED[name]) for name in NESTED)
    layers = [torch.zeros(2), {"half": torch.zeros(1).bfloat16()}]
    target: dict[str, Any] = {
        "net": {"w": torch.zeros(2, 3), "layers": layers},
        "raw": {"x": None},
        "tags": None,
    }
    load(target, storage_reader=SafetensorsReader(DATA / "nested"))
    assert same(target["net"]["w"], NESTED["net.w"])
    assert same(target["net"]["layers"], [NESTED["net.layers.0"], {"half": NESTED["net.layers.1.half"]}])
    assert (target["raw"], target["tags"]) == ({"x": b"\x00\xff"}, {"a", "b"})


@pytest.mark.parametrize("name", ["nested", "step_00000003"])
def test_old_checkpoints_are_sound(name: str, tmp_path: Path) -> None:
    assert verify(shutil.copytree(DATA / name, tmp_path / name)).problems == ()


def resigned(folder: Path, **changes: object) -> Path:
    path = shutil.copytree(DATA / "nested", folder / "nested")
    body = json.loads((path / "manifest.json").read_text())
    del body["digest"]
    body.update(changes)
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    (path / "manifest.json").write_text(json.dumps({**body, "digest": xxhash.xxh3_128_hexdigest(canonical)}))
    return path


@pytest.mark.parametrize(
    ("number", "text"), [(1.2, "newer version"), (2, "newer version"), ("x", "'x'; this")]
)
def test_manifest_of_later_format_is_mismatch(number: object, text: str, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=rf"nested .*{text}.*reads formats 1 and 1\.1"):
        SafetensorsReader(resigned(tmp_path, format=number)).objects  # noqa: B018


def test_index_long_dtype_names_need_minor_version() -> None:
    item = PlannedItem(ShardItem("w", "F8_E5M2FNUZ", (0,), (4,)), (4,))
    assert ExpectedFiles((PlannedFile("shard", (item,)),)).has_new_dtypes
    assert not ExpectedFiles(
        (PlannedFile("shard", (replace(item, item=replace(item.item, dtype="F8_E5M2")),)),)
    ).has_new_dtypes


def test_manifest_of_minor_version_is_read(tmp_path: Path) -> None:
    assert SafetensorsReader(resigned(tmp_path, format=1.1)).objects["epoch"] == 4


@pytest.mark.parametrize(
    ("train_state", "minor"),
    [
        (b'{"a": 1}', False),
        (b'{"a": {"__tuple__": [1]}}', False),
        (b'{"a": "\\"__tensor__\\""}', False),
        (b'{"a": {"__complex__": [1, 2]}}', True),
        (b'{"__paths__": {"tree": {"a": {}}}}', True),
    ],
)
def test_manifest_minor_version_only_when_needed(train_state: bytes, minor: bool) -> None:
    assert manifest.needs_minor(train_state) is minor
