"""Datasets of the user's: which samples are read, held out and stacked, and what is said of mistakes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kempnerforge.config.job import JobConfig, validate_tree
from kempnerforge.config.plugin_uses import plugin_issues
from kempnerforge.config.schema import load_job
from kempnerforge.data.fingerprint import explain_difference, fingerprint
from kempnerforge.data.loader import BatchLoader, Cursor, FieldsBatch, eval_batches
from kempnerforge.data.map_dataset import MapDataset, UserDataset, held_out_indices
from kempnerforge.distributed.consensus import ControlGroup
from kempnerforge.errors import ConfigError, DataError, PluginError
from kempnerforge.train.map_data import open_map_dataset
from kempnerforge.train.model_setup import loss_issues
from kempnerforge.train.termination.signals import StopSignals

SOURCE = """
import numpy as np
import torch
from torch import nn

class Squares:
    def __init__(self, count, kind="dict"):
        self.count, self.kind = count, kind
    def __len__(self):
        return self.count
    def __getitem__(self, i):
        i = int(i)
        return {
            "dict": {"x": torch.full((2, 3), float(i)), "y": np.int32(i * i), "z": i, "w": i / 2},
            "list": [i, i + 1, i + 2, i + 3, i + 4],
            "tensor": torch.arange(i, i + 5, dtype=torch.int32),
            "array": np.arange(i, i + 5, dtype=np.uint16),
            "short": [i, i],
            "float": np.ones(5),
            "text": "four",
            "ragged": {"x": torch.zeros(1 + i % 2)},
            "word": {"x": torch.zeros(1), "word": "four"},
            "mixed": {"x": 1} if i == 0 else [1, 2, 3, 4, 5],
            "negative": [i, i, i, i, -1],
            "bf16": {"x": torch.full((2,), i, dtype=torch.bfloat16)},
            "random": {"x": torch.rand(2)},
            "nan": {"x": float("nan")},
        }[self.kind]

class Failing(Squares):
    def __getitem__(self, i):
        if i == 3:
            raise OSError("disk\\nis gone")
        return super().__getitem__(i)

def stream():
    return iter([1, 2])

def broken(path):
    raise FileNotFoundError(path)
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outside_data.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "outside_data", raising=False)


def user_dataset(kind: str = "dict", count: int = 10, name: str = "Squares") -> UserDataset:
    return UserDataset(f"outside_data:{name}", {"count": count, "kind": kind}, key="data.dataset")


def dataset(
    kind: str = "dict", count: int = 10, *, name: str = "Squares", val_fraction: float = 0.2
) -> MapDataset:
    train = user_dataset(kind, count, name)
    return MapDataset(
        train,
        None,
        own_val=False,
        val_fraction=val_fraction,
        vocab_size=300,
        has_tokens=kind not in ("dict", "ragged", "word", "bf16"),
    )


def job(tree: dict[str, Any], **train: Any) -> JobConfig:
    built, faults = validate_tree({"data": tree, "train": {"seq_len": 4, **train}})
    assert built is not None, faults
    return built


def opened(tree: dict[str, Any], **sections: Any) -> MapDataset:
    built, faults = validate_tree({"data": tree, "train": {"seq_len": 4}, **sections})
    assert built is not None, faults
    return open_map_dataset(built, ControlGroup(None), StopSignals())


def test_held_out_indices_are_stable_when_samples_are_added() -> None:
    for fraction in (0.01, 0.3, 0.5, 0.9):
        held = held_out_indices(10_000, fraction)
        assert held.size == pytest.approx(10_000 * fraction, abs=1)
        assert np.all(np.diff(held) > 0)
        more = held_out_indices(25_000, fraction)
        assert np.array_equal(more[more < 10_000], held)
    assert len(set(held_out_indices(10_000, 0.01) % 100)) > 40  # not every hundredth
    assert held_out_indices(5, 0.01).tolist() == [4]
    assert held_out_indices(5, 0.0).size == held_out_indices(1, 0.5).size == 0


def test_train_and_val_have_each_index_once() -> None:
    data = dataset("dict", 1003, val_fraction=0.13)
    train, val = data.split("train", 4), data.split("val", 4)
    indices = [samples.indices(np.arange(samples.num_samples)) for samples in (train, val)]
    assert sorted(np.concatenate(indices)) == list(range(1003))
    assert np.all(np.diff(indices[0]) > 0)


@pytest.mark.parametrize("kind", ["list", "tensor", "array"])
def test_token_samples_become_inputs_and_targets(kind: str) -> None:
    samples = dataset(kind, val_fraction=0).split("train", 4)
    [batch] = eval_batches(samples, num_batches=1, global_batch_size=2, batch_size=2)
    assert not isinstance(batch, FieldsBatch)
    assert batch.inputs_ABT.tolist() == [[[0, 1, 2, 3], [1, 2, 3, 4]]]
    assert batch.targets_ABT.tolist() == [[[1, 2, 3, 4], [2, 3, 4, 5]]]
    assert (batch.inputs_ABT.dtype, batch.num_tokens) == (torch.int64, 8)


def test_dict_samples_are_stacked_as_they_are() -> None:
    samples = dataset(val_fraction=0).split("train", 4)
    [batch] = eval_batches(samples, num_batches=1, global_batch_size=4, batch_size=2)
    assert isinstance(batch, FieldsBatch)
    first, second = batch.micro_batches
    assert {name: (list(value.shape), value.dtype) for name, value in second.items()} == {
        "x": ([2, 2, 3], torch.float32),
        "y": ([2], torch.int32),
        "z": ([2], torch.int64),
        "w": ([2], torch.float32),
    }
    assert (first["y"].tolist(), second["y"].tolist()) == ([0, 1], [4, 9])
    [batch] = eval_batches(
        dataset("bf16").split("train", 4), num_batches=1, global_batch_size=2, batch_size=2
    )
    assert isinstance(batch, FieldsBatch)
    assert batch.micro_batches[0]["x"].dtype == torch.bfloat16


def trained_on(ranks: int, cursor: int = 0, steps: int = 6) -> list[list[int]]:
    """The samples of each global batch, in the order of its micro-batches."""
    samples = dataset(count=37).split("train", 4)
    loaders = [
        BatchLoader(
            samples,
            seed=5,
            global_batch_size=8,
            batch_size=2,
            dp_rank=rank,
            dp_size=ranks,
            cursor=Cursor(cursor),
        )
        for rank in range(ranks)
    ]
    batches = []
    for _ in range(steps):
        parts = [next(loader)[0] for loader in loaders]
        assert len({part.digest for part in parts}) == 1
        rows = [[micro["z"].tolist() for micro in part.micro_batches] for part in parts]  # type: ignore[union-attr]
        batches.append([index for group in zip(*rows, strict=True) for micro in group for index in micro])
    for loader in loaders:
        loader.close()
    return batches


def test_dict_batches_same_on_any_number_of_ranks() -> None:
    alone = trained_on(1)
    assert trained_on(2) == trained_on(4) == alone
    assert trained_on(2, cursor=24, steps=3) == alone[3:]
    train = dataset(count=37).split("train", 4)
    epoch = [index for batch in alone for index in batch][: train.num_samples]
    assert sorted(epoch) == train.indices(np.arange(train.num_samples)).tolist()


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("short", "sample 0 has shape [2]; train.seq_len = 4 needs 5 tokens"),
        ("float", "sample 0 is float64; token ids are integers"),
        ("text", "sample 0 is a str, not 5 token ids"),
        ("negative", "sample 0 holds the negative token id -1"),
        ("word", "sample 0 has a str as 'word'; a value is a tensor, an array or a number"),
    ],
)
def test_unusable_first_sample_is_refused_at_start(kind: str, problem: str) -> None:
    tree = {"dataset": "outside_data:Squares", "args": {"count": 9, "kind": kind}}
    with pytest.raises(DataError) as error:
        opened({**tree, "val_fraction": 0.0})
    assert str(error.value) == f'data.dataset "outside_data:Squares": {problem}'


def test_unusable_later_sample_is_named() -> None:
    ids = np.arange(4)
    with pytest.raises(
        PluginError, match=r"sample 1 is x float32 \[2\], and sample 0 of the same batch is x"
    ):
        dataset("ragged", val_fraction=0).split("train", 4).read_fields(ids)
    with pytest.raises(PluginError, match="sample 1 is a list, and sample 0 is a dict"):
        user_dataset("mixed").stacked(ids)
    with pytest.raises(PluginError, match="sample 296 holds token id 300, but the vocabulary has 300 ids"):
        user_dataset("list", 400).tokens(296, 5, 300)


def test_error_of_getitem_names_dataset_and_sample() -> None:
    samples = dataset("dict", name="Failing", val_fraction=0).split("train", 4)
    loader = BatchLoader(samples, seed=0, global_batch_size=10, batch_size=10)
    with loader, pytest.raises(PluginError) as error:
        next(loader)
    where = f"({Path.cwd() / 'outside_data.py'}:{SOURCE[: SOURCE.index('raise OSError')].count(chr(10)) + 1})"
    assert str(error.value) == (
        f'data.dataset "outside_data:Failing": sample 3 raised OSError: disk is gone {where}'
    )
    assert error.value.exit_status == 1


def test_dataset_that_cannot_be_built_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"data.args: outside_data:broken\(...\) raised FileNotFoundError: x"
    ):
        opened({"dataset": "outside_data:broken", "args": {"path": "x"}})
    with pytest.raises(ConfigError, match="returned a list_iterator, which has no __getitem__"):
        opened({"dataset": "outside_data:stream"})
    with pytest.raises(DataError, match="has no samples"):
        opened({"dataset": "outside_data:Squares", "args": {"count": 0}})
    with pytest.raises(DataError, match="none is left for the train split"):
        dataset("dict", 2, val_fraction=0.999).split("train", 4)


def test_sample_that_is_random_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    tree = {"dataset": "outside_data:Squares", "val_fraction": 0.0}
    for kind in ("nan", "bf16", "array"):
        opened({**tree, "args": {"count": 3, "kind": kind}})
    assert not caplog.messages
    opened({**tree, "args": {"count": 3, "kind": "random"}})
    assert caplog.messages == [
        '"outside_data:Squares": two reads of sample 0 differ, so a resumed run will not be bitwise equal. '
        "Derive random numbers from the index"
    ]


def test_own_validation_dataset_leaves_all_samples_to_training(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "kempnerforge")
    tree = {
        "dataset": "outside_data:Squares",
        "args": {"count": 30},
        "val": {"dataset": "outside_data:Squares", "args": {"count": 7}},
    }
    data = opened(tree, eval={"interval": 2})
    assert (data.split("train", 4).num_samples, data.split("val", 4).num_samples) == (30, 7)
    assert caplog.messages == ['data: 30 samples in "outside_data:Squares", 0 of them held out']
    tree["val"]["args"] = {"count": 7, "kind": "list"}
    with pytest.raises(DataError, match=r'^data.val.dataset "outside_data:Squares": sample 0 is a list'):
        opened(tree, eval={"interval": 2})


def test_fingerprint_of_dataset_names_what_changed() -> None:
    was = fingerprint(dataset("dict", 30), "train", 4, seed=1)
    assert explain_difference(was, fingerprint(dataset("dict", 30), "train", 999, seed=1)) == []
    now = fingerprint(dataset("dict", 31, val_fraction=0.5), "train", 4, seed=1)
    assert explain_difference(was, now) == [
        "data.args: was {'count': 30, 'kind': 'dict'}, is {'count': 31, 'kind': 'dict'}",
        "samples of data.dataset: was 30, is 31",
        "the fraction that is held out: was 0.2, is 0.5",
        "samples per epoch: was 24, is 16",
    ]
    tokens = fingerprint(dataset("list", 30), "train", 4, seed=1)
    assert explain_difference(tokens, fingerprint(dataset("list", 30), "train", 5, seed=1)) == [
        "train.seq_len: was 4, is 5"
    ]
    Path("outside_data.py").write_text(f"{SOURCE}\n# changed\n")
    assert fingerprint(dataset("dict", 30), "train", 4, seed=1) == was


def test_config_of_dataset_is_checked(tmp_path: Path) -> None:
    args = {"dataset": "outside_data:Squares", "args": {"count": 3, "kin": "dict"}}
    [issue] = plugin_issues(job({**args, "val": {"dataset": "outside_data:Squares", "args": {"count": 1}}}))
    assert str(issue) == (
        'data.args.kin: outside_data:Squares has no argument kin; did you mean "kind"? it takes: count, kind'
    )
    [issue] = plugin_issues(job({"dataset": "outside_data:stream", "val": {"dataset": "outside_data:no"}}))
    assert issue.key == "data.val.dataset"
    for tree, key in (
        ({"text": "x", "dataset": "a:b"}, "data.text"),
        ({"text": "x", "args": {"a": 1}}, "data.args"),
        ({"text": "x", "val": {"dataset": "a:b"}}, "data.val"),
    ):
        _, faults = validate_tree({"data": tree})
        assert [fault.key for fault in faults] == [key]
    (tmp_path / "own.toml").write_text(job({**args, "val": {"dataset": "a:b"}}).to_toml())
    assert load_job(tmp_path / "own.toml").job.data == job({**args, "val": {"dataset": "a:b"}}).data


class OwnLoss(nn.Module):
    def loss(self, batch: Any) -> Any:
        return batch


class LossAsAttribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loss = nn.CrossEntropyLoss()


def test_layout_and_data_must_suit_the_models_loss() -> None:
    piped, faults = validate_tree(
        {
            "data": {"text": "x"},
            "model": {"name": "a:B"},
            "distributed": {"pp": 2},
            "train": {"batch_size": 2},
        }
    )
    assert piped is not None, faults
    [issue] = loss_issues(piped, OwnLoss())
    assert str(issue) == (
        "distributed.pp: 2 needs a model from tokens to logits, and a:B has a loss(batch); set pp = 1"
    )
    assert loss_issues(piped, LossAsAttribute()) == []
    others = job({"text": "x"}, loss="chunked_cross_entropy", z_loss=1e-4)
    issues = loss_issues(others, OwnLoss())
    assert [issue.key for issue in issues] == ["train.loss", "train.z_loss"]
    dicts = job({"dataset": "a:D"})
    [issue] = loss_issues(dicts, LossAsAttribute(), has_tokens=False)
    assert issue.problem == "samples of a:D are dicts, and llama has no loss(batch)"
    assert loss_issues(dicts, OwnLoss(), has_tokens=False) == []
