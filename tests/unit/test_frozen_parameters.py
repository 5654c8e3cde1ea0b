"""``model.freeze`` in configs and plans, fingerprints of frozen tensors, and their files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kempnerforge.checkpoint.format.safetensors_file import ShardItem
from kempnerforge.checkpoint.results import SaveReport
from kempnerforge.checkpoint.retention.disk_space import DiskSpaceGuard
from kempnerforge.checkpoint.save.commit import PlannedItem
from kempnerforge.checkpoint.save.frozen import _CHUNK, _word_sum, fingerprints
from kempnerforge.checkpoint.save.plan import make_plan
from kempnerforge.checkpoint.save.union import Held, unite
from kempnerforge.checkpoint.state.train_state import TrainState
from kempnerforge.cli.ckpt_list import bytes_on_disk, files_of
from kempnerforge.config.model_changes import model_changes
from kempnerforge.config.schema import CheckpointConfig, JobConfig, load_job
from kempnerforge.errors import ConfigError, ConfigIssue
from kempnerforge.model.build import build_meta
from kempnerforge.plan.checkpoint_size import checkpoint_size
from kempnerforge.plan.memory import device_memory
from kempnerforge.telemetry.console_text import commit_line
from kempnerforge.train.optimizer import build_optimizer, parameter_groups
from kempnerforge.train.own_model import plan_parameters


def faults(**model: Any) -> list[ConfigIssue]:
    groups = model.pop("groups", [])
    optimizer = {"groups": [{"match": match, "lr_scale": 0.5} for match in groups]}
    try:
        JobConfig.model_validate({"model": model, "data": {"text": "python-stdlib"}, "optimizer": optimizer})
    except ConfigError as error:
        return list(error.faults)
    return []


@pytest.mark.parametrize(
    ("model", "key", "problem", "hint"),
    [
        ({"freeze": ["tok_embedings"]}, "model.freeze[0]", "matches no parameter", "tok_embeddings.weight?"),
        ({"freeze": ["norm", "zzz"]}, "model.freeze[1]", "matches no parameter", "tok_embeddings.weight, "),
        ({"freeze": ["("]}, "model.freeze[0]", '"(" is not a regular expression', "to match a dot"),
        ({"freeze": ["."]}, "model.freeze", "matches every parameter", "leave one to train"),
        ({"freeze": ["output"], "tie_embeddings": True}, "model.freeze[0]", "matches no parameter", ""),
        (
            {"freeze": ["norm"], "groups": ["ffn_norm"]},
            "optimizer.groups[0].match",
            "matches only frozen parameters, such as layers.0.ffn_norm.weight",
            "change model.freeze",
        ),
    ],
)
def test_freeze_invalid_is_named(model: dict[str, Any], key: str, problem: str, hint: str) -> None:
    (issue,) = faults(**model)
    assert issue.key == key
    assert problem in issue.problem
    assert hint in issue.allowed


def test_freeze_of_own_model_is_a_key_of_its_own() -> None:
    assert faults(name="a:b", freeze=["weight"]) == []
    job = JobConfig.model_validate({"model": {"name": "a:b", "freeze": ["x"]}, "data": {"text": "t"}})
    assert 'freeze = ["x"]' in job.to_toml()


class Head(nn.Module):
    """A model of the user's with a frozen part of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.head = nn.Embedding(300, 8), nn.Linear(8, 300)
        self.base.requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.base(tokens))


def own_job(*freeze: str) -> JobConfig:
    model = {"name": f"{__name__}:Head", "freeze": list(freeze)}
    return JobConfig.model_validate(
        {"model": model, "data": {"text": "python-stdlib"}, "train": {"seq_len": 8}}
    )


def test_freeze_own_model_matches_names_and_keeps_its_own() -> None:
    job = own_job("bias")
    built = build_meta(job.model, seed=0)
    assert [name for name, p in built.module.named_parameters() if p.requires_grad] == ["head.weight"]
    with pytest.raises(ConfigError, match=r'model\.freeze\[0\].*"embed" matches no parameter'):
        build_meta(own_job("embed").model, seed=0)
    with pytest.raises(ConfigError, match=r"no parameter of .* requires a gradient"):
        build_meta(own_job("head").model, seed=0)
    parameters, _ = plan_parameters(job)
    assert [p.name for p in parameters[0] if p.frozen] == ["base.weight", "head.bias"]


@pytest.mark.parametrize("name", ["adamw", "muon", "schedule_free_adamw"])
def test_optimizer_has_no_frozen_parameters(name: str) -> None:
    tree = {"freeze": ["tok_embeddings", "output", "norm"], "dim": 32, "n_layers": 1}
    job = JobConfig.model_validate({"model": tree, "data": {"text": "t"}, "optimizer": {"name": name}})
    module = build_meta(job.model, seed=0).module.to_empty(device="cpu")
    groups = parameter_groups([module], job.optimizer)
    trained = {name for name, param in module.named_parameters() if param.requires_grad}
    assert {name for group in groups for name in group.names} == trained
    optimizer = build_optimizer([module], job.optimizer, torch.device("cpu"))
    for made in [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else optimizer.values():
        assert all(p.requires_grad for group in made.param_groups for p in group["params"])


def test_model_changes_name_other_freeze() -> None:
    was, now = {"dim": 64}, {"dim": 64, "freeze": ["norm"]}
    assert model_changes(was, was).lines == ()
    assert model_changes(was, now).lines == ("model.freeze was [], is ['norm']",)
    own = {"name": "a:b", "args": {}}
    assert model_changes(own, {**own, "freeze": ["x"]}).lines == ("model.freeze was [], is ['x']",)


TENSORS = [
    torch.arange(24, dtype=torch.float32).reshape(4, 6),
    torch.arange(24, dtype=torch.float32).reshape(4, 6).t(),
    torch.arange(7, dtype=torch.bfloat16),
    torch.tensor([True, False, True]),
    torch.tensor(1.5),
    torch.empty(0),
    torch.tensor([1 + 2j, 3j]).conj(),
    torch.arange(9, dtype=torch.int16)[3:],
]


def word_sum(tensor: torch.Tensor) -> int:
    """What a device computes, here in host memory."""
    return int(_word_sum(tensor.resolve_conj().contiguous().view(-1)))


@given(st.sampled_from(range(len(TENSORS))), st.data())
def test_fingerprint_changed_element_is_noticed(which: int, data: st.DataObject) -> None:
    tensor = TENSORS[which].clone()
    if not tensor.numel():
        return
    before, sum_before = fingerprints([tensor]), word_sum(tensor)
    assert (fingerprints([tensor.clone()]), word_sum(tensor.clone())) == (before, sum_before)
    flat = tensor.resolve_conj().contiguous().view(-1)
    at = data.draw(st.integers(0, flat.numel() - 1))
    flat[at] = ~flat[at] if flat.dtype == torch.bool else flat[at] + 1
    assert fingerprints([flat]) != before
    assert word_sum(flat) != sum_before


@given(st.permutations(range(6)))
def test_fingerprint_swapped_rows_are_noticed(order: list[int]) -> None:
    tensor = torch.arange(6 * 40, dtype=torch.float32).reshape(6, 40)
    moved = tensor[order]
    assert (word_sum(moved) == word_sum(tensor)) == (order == sorted(order))
    assert (fingerprints([moved]) == fingerprints([tensor])) == (order == sorted(order))


def test_fingerprint_swapped_chunks_are_noticed() -> None:
    tensor = torch.arange(2 * _CHUNK)
    assert word_sum(torch.cat([tensor[_CHUNK:], tensor[:_CHUNK]])) != word_sum(tensor)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_fingerprint_changed_high_bits_are_noticed(dtype: torch.dtype) -> None:
    """Signs are the highest bits of words. In a plain sum an even number of changes cancels out."""
    tensor = torch.arange(1, 65).to(dtype)
    last = tensor.clone()
    last[3::4] *= -1
    double = tensor.clone()
    double[1::2] *= 2
    turned = [tensor * (1 + 2j), (tensor * (1 + 2j)).conj()] if dtype.is_complex else []
    sums = [word_sum(each) for each in (tensor, -tensor, last, double, *turned)]
    assert len(set(sums)) == len(sums)


def item(name: str, offset: int, rows: int, whole: int) -> PlannedItem:
    return PlannedItem(ShardItem(name, "F32", (offset,), (rows,)), (whole,))


def test_plan_frozen_tensors_have_files_of_their_own() -> None:
    """Balanced apart from the others: later saves write only those."""
    held = [item(name, 0, 8, 8) for name in ("a", "b", "base", "c", "d", "other")]
    plan = make_plan([held, held], {"base", "other"})
    files = [file for of_rank in plan.files for file in of_rank]
    assert [file.name for file in files] == [f"shard_{n:05d}_of_00004.safetensors" for n in range(4)]
    assert [file.frozen for file in files] == [False, True, False, True]
    assert [len(file.items) for file in files] == [2, 1, 2, 1]
    assert {i.item.name for file in files if file.frozen for i in file.items} == {"base", "other"}


def test_plan_frozen_on_one_rank_only_is_not_frozen() -> None:
    halves = [[item("w", 0, 4, 8), item("v", 0, 4, 8)], [item("w", 4, 4, 8), item("v", 4, 4, 8)]]
    united = unite([Held(halves[0], frozen=("v", "w")), Held(halves[1], frozen=("v",))])
    assert united.frozen == {"v"}


def test_capture_names_frozen_parameters_only() -> None:
    """Not buffers, which a forward may change."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    state = TrainState(model=model, optimizer=torch.optim.SGD(model[1].parameters(), lr=0.1))
    assert state.capture().frozen == {"model.0.weight", "model.0.bias"}


def test_report_row_counts_written_bytes() -> None:
    row = SaveReport(3, "interval", 0.0, write_s=2.0, size_bytes=10_000, linked_bytes=9_000).row()
    assert (row["checkpoint/size_bytes"], row["checkpoint/written_bytes"]) == (10_000, 1_000)
    assert row["checkpoint/write_gb_per_s"] == pytest.approx(500 / 1e9)
    assert "committed: 10.0 kB (1.0 kB written) in" in commit_line({"step": 4, **row})


def plan_numbers(*freeze: str) -> tuple[Any, Any]:
    job = load_job(None, ["--data.text=python-stdlib", "--model.n_layers=2"]).job
    tree = job.model_dump(mode="json", exclude_unset=True)
    job = JobConfig.model_validate({**tree, "model": {"n_layers": 2, "freeze": list(freeze)}})
    layout = job.geometry(1)
    return device_memory(job, layout, 0), checkpoint_size(job, layout)


def test_plan_counts_no_gradient_and_state_of_frozen() -> None:
    memory, size = plan_numbers()
    frozen_memory, frozen_size = plan_numbers("tok_embeddings", "layers", "output")
    trained = 256 * 4  # the last norm, in fp32
    assert frozen_memory.weights == memory.weights
    assert frozen_memory.optimizer == 2 * trained
    assert frozen_memory.gradients <= trained
    assert frozen_memory.total < memory.total
    assert size.written_bytes == size.size_bytes
    assert frozen_size.size_bytes < 0.4 * size.size_bytes
    assert frozen_size.written_bytes < 60_000
    assert frozen_size.num_files == size.num_files + 1


def test_space_next_save_needs_no_room_for_links(tmp_path: Path) -> None:
    guard = DiskSpaceGuard(tmp_path, CheckpointConfig())
    guard.expect_links(1 << 60)
    assert guard.before_training((1 << 60) + 1000, 2) == ""
    assert guard.fits()
    guard.expect_links(0)
    assert not guard.fits()


def test_bytes_on_disk_counts_links_once(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    (folders[0] / "base").write_bytes(bytes(1000))
    for folder in folders[1:]:
        os.link(folders[0] / "base", folder / "base")
        (folder / "own").write_bytes(bytes(10))
    files = [found for folder in folders for found in files_of(folder)]
    assert bytes_on_disk(files) == 1020
    assert bytes_on_disk(files, if_deleted=True) == 1020
    assert bytes_on_disk(files_of(folders[1]), if_deleted=True) == 10
