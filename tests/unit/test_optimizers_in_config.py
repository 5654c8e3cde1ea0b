"""Optimizers and schedules that a config names: groups, arguments, and the arithmetic of our own ones."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch
from support.lazy_state import CPU, small_model
from support.optimizers import Lion as PlainLion
from support.patch_target import patch_target
from torch import nn

from kempnerforge.config.job import JobConfig, validate_tree
from kempnerforge.config.plugin_uses import optimizer_issues, plugin_issues
from kempnerforge.config.schedule_changes import learning_rate_change, when_continued
from kempnerforge.config.scheduler import lr_at
from kempnerforge.config.schema import ModelConfig, OptimizerConfig, SchedulerConfig, load_job
from kempnerforge.errors import ConfigError
from kempnerforge.model.llama import Llama
from kempnerforge.train.optimizer import build_optimizer, each, hidden_matrices, hyperparameters_of
from kempnerforge.train.optimizers.adafactor import Adafactor
from kempnerforge.train.optimizers.lion import Lion
from kempnerforge.train.optimizers.muon import Muon, orthogonalize
from kempnerforge.train.optimizers.schedule_free_adamw import ScheduleFreeAdamW
from kempnerforge.train.own_model import check_own_model

TORCH_LBFGS = patch_target("torch.optim:LBFGS")
TORCH_MUON = patch_target("torch.optim:Muon")
TORCH_SGD = patch_target("torch.optim:SGD")
DATA = {"text": "python-stdlib"}


def config(**keys: Any) -> OptimizerConfig:
    return OptimizerConfig.model_validate(keys)


def groups_of(model: nn.Module, **keys: Any) -> dict[str, dict[str, Any]]:
    optimizer = build_optimizer([model], config(**keys), CPU)
    return {group["name"]: group for one in each(optimizer) for group in one.param_groups}


# Groups


def test_groups_first_match_wins_and_sets_its_keys() -> None:
    found = groups_of(
        small_model(),
        lr=0.5,
        weight_decay=0.2,
        groups=[
            {"match": r"^0\.", "lr_scale": 0.1},
            {"match": r"weight$", "lr": 0.25, "weight_decay": 0.3, "betas": [0.5, 0.6], "eps": 1e-3},
        ],
    )
    assert {name: len(group["params"]) for name, group in found.items()} == {
        "decay": 0,
        "no_decay": 0,
        "groups[0].decay": 1,
        "groups[1].decay": 1,
        "groups[1].no_decay": 1,
    }
    first, second, norm = (found[f"groups[{name}"] for name in ("0].decay", "1].decay", "1].no_decay"))
    assert (first["lr"], first["lr_scale"], first["weight_decay"]) == (0.05, 0.1, 0.2)
    assert (second["lr"], second["lr_scale"], second["weight_decay"]) == (0.25, 0.5, 0.3)
    assert norm["weight_decay"] == 0.3  # a group sets it for norms too
    assert (second["betas"], second["eps"], first["betas"]) == ((0.5, 0.6), 1e-3, (0.9, 0.95))


def test_groups_norms_keep_weight_decay_zero() -> None:
    found = groups_of(small_model(), weight_decay=0.2, groups=[{"match": "weight", "lr_scale": 2.0}])
    assert found["groups[0].decay"]["weight_decay"] == 0.2
    assert found["groups[0].no_decay"]["weight_decay"] == 0.0


def test_groups_args_reach_the_optimizers_group() -> None:
    found = groups_of(
        small_model(), name="sgd", args={"momentum": 0.9}, groups=[{"match": "^2", "args": {"momentum": 0.5}}]
    )
    assert {name: group["momentum"] for name, group in found.items()} == {
        "decay": 0.9,
        "no_decay": 0.9,
        "groups[0].decay": 0.5,
    }


def test_muon_gets_hidden_matrices_adamw_the_rest() -> None:
    model = Llama(ModelConfig(dim=16, n_layers=1, n_heads=2, ffn_hidden_dim=24, vocab_size=300))
    names = {param: name for name, param in model.named_parameters()}
    optimizers = build_optimizer(
        [model],
        config(name="muon", groups=[{"match": "wo", "hidden": False}, {"match": "output", "hidden": True}]),
        CPU,
    )
    assert isinstance(optimizers, dict)
    got = {
        kind: {names[param] for group in one.param_groups for param in group["params"]}
        for kind, one in optimizers.items()
    }
    layer = "layers.0."
    matrices = {f"{layer}attention.w{x}.weight" for x in "qkv"}
    matrices |= {f"{layer}feed_forward.w{x}.weight" for x in "123"}
    assert got["muon"] == {*matrices, "output.weight"}
    assert got["adamw"] == {*names.values()} - got["muon"]
    assert "hidden" not in optimizers["muon"].param_groups[0]


class Foreign(nn.Module):
    """An embedding, attention, a convolution, a table of its own, and an output layer."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.wte = nn.Embedding(11, 6)
        self.positions = nn.Parameter(torch.zeros(5, 6))
        self.attention = nn.MultiheadAttention(6, 2)
        self.conv = nn.Conv1d(6, 6, 3)
        self.head = nn.Linear(6, 11, bias=False)
        if tied:
            self.head.weight = self.wte.weight


class Positions(nn.Module):
    """An embedding of positions whose rows are as many as the layers are wide, as in GPT-2 medium."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 6), nn.Embedding(6, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 11)


def test_hidden_matrices_as_wide_as_an_embedding_stay_hidden() -> None:
    assert hidden_matrices([Positions()]) == {"blocks.0.weight", "blocks.1.weight"}


def test_groups_without_a_table_set_their_lr_scale() -> None:
    """Otherwise the scale of a table that was removed would come back from the checkpoint."""
    assert {group["lr_scale"] for group in groups_of(small_model()).values()} == {1.0}


@pytest.mark.parametrize("tied", [False, True])
def test_hidden_matrices_of_other_model_are_its_layers(tied: bool) -> None:
    assert hidden_matrices([Foreign(tied=tied)]) == {
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "conv.weight",
    }
    assert hidden_matrices([nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))]) == {"0.weight"}


# Rules


@pytest.mark.parametrize(
    ("tree", "problem"),
    [
        ({"optimizer": {"name": "adamww"}}, '"adamww" is not a known optimizer; did you mean "adamw"?'),
        (
            {"optimizer": {"args": {"eps": 1.0}}},
            "optimizer.args.eps: eps is a key of its own; write optimizer.eps",
        ),
        ({"optimizer": {"groups": [{"match": "("}]}}, 'groups[0].match: "(" is not a regular expression'),
        (
            {"optimizer": {"groups": [{"match": "w", "lr": 1.0, "lr_scale": 2.0}]}},
            "groups[0].lr_scale: lr and lr_scale are both set",
        ),
        (
            {"optimizer": {"groups": [{"match": "wq"}, {"match": "attn"}]}},
            'groups[1].match: "attn" matches no parameter',
        ),
        (
            {"optimizer": {"groups": [{"match": "layers"}, {"match": r"\.wq"}]}},
            "matches only parameters of earlier groups, such as layers.0.attention.wq.weight",
        ),
        ({"optimizer": {"groups": [{"lr": 1.0}]}}, "optimizer.groups[0].match: is missing"),
        (
            {"scheduler": {"name": "a:b", "warmup_steps": 3}},
            'scheduler.warmup_steps: has no effect: "a:b" alone decides the schedule',
        ),
        ({"scheduler": {"args": {"a": 1}}}, "scheduler.args: are for a schedule of your own"),
    ],
)
def test_optimizer_config_with_mistake_is_explained(tree: dict[str, Any], problem: str) -> None:
    job, issues = validate_tree({"data": DATA, **tree})
    assert job is None
    assert problem in str(ConfigError(issues))


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"name": "lion", "eps": 1e-8}, "optimizer.eps: lion has no argument eps"),
        ({"name": "sgd", "betas": [0.9, 0.9]}, "optimizer.betas: sgd has no argument betas"),
        (
            {"name": TORCH_SGD, "args": {"momentun": 1}},
            "optimizer.args.momentun: torch.optim:SGD has no",
        ),
        ({"args": {"nesterov": True}}, "optimizer.args.nesterov: adamw has no argument nesterov"),
        (
            {"name": "sgd", "groups": [{"match": "w", "betas": [0.9, 0.9]}]},
            "optimizer.groups[0].betas: sgd has no argument betas",
        ),
        (
            {"groups": [{"match": "w", "args": {"momentum": 1}}]},
            "optimizer.groups[0].args.momentum: adamw has no argument momentum",
        ),
        (
            {"name": "outside_optimizers:no_rate", "lr": 0.1},
            "optimizer.lr: outside_optimizers:no_rate has no",
        ),
    ],
)
def test_optimizer_key_that_class_does_not_take_refused(
    outside: None, keys: dict[str, Any], problem: str
) -> None:
    assert problem in str(ConfigError(optimizer_issues(config(**keys))))


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"name": TORCH_LBFGS}, "LBFGS doesn't support per-parameter options"),
        ({"name": TORCH_MUON}, "Muon only supports 2D parameters"),
        ({"name": "outside_optimizers:number"}, '"outside_optimizers:number" made a int'),
        ({"name": "outside_optimizers:forgetful"}, '"outside_optimizers:forgetful" made a NoneType'),
        ({"name": "outside_optimizers:empty"}, '"outside_optimizers:empty" made an empty dict'),
        ({"name": "outside_optimizers:half"}, '"outside_optimizers:half" made a NoneType'),
        (
            {"name": "schedule_free_adamw", "betas": [0.0, 0.9]},
            '"schedule_free_adamw" raised ValueError: betas[0] is 0.0; it must be more than 0',
        ),
        (
            {"name": "schedule_free_adamw", "groups": [{"match": "1", "betas": [0.0, 0.9]}]},
            '"schedule_free_adamw" raised ValueError: betas[0] is 0.0; it must be more than 0',
        ),
        ({"name": "outside_optimizers:Closure"}, "its step() needs closure"),
        ({"groups": [{"match": "nothing"}]}, 'optimizer.groups[0].match: "nothing" matches no parameter'),
        ({"groups": [{"match": "0", "hidden": True}]}, "the optimizer updates all parameters alike"),
        (
            {"name": "muon", "groups": [{"match": "1", "hidden": True}]},
            "1.weight of shape (6,) is not a matrix",
        ),
    ],
)
def test_optimizer_that_cannot_be_built_is_explained(
    outside: None, keys: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        build_optimizer([small_model()], config(**keys), CPU)
    assert problem in str(caught.value)


OUTSIDE = """
import math
import torch

class Closure(torch.optim.SGD):
    def step(self, closure):
        return super().step(closure)

class Own(torch.optim.Optimizer):
    def __init__(self, params, lr, strength=1.0):
        super().__init__(params, {"lr": lr, "strength": strength, "k": 0})
    def step(self):
        pass

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(257, 8)
        self.head = torch.nn.Linear(8, 257)

    def forward(self, tokens):
        return self.head(self.table(tokens))

def number(groups, lr):
    return 3

def forgetful(groups, lr):
    torch.optim.SGD(groups, lr)

def empty(groups, lr):
    return {}

def half(groups, lr):
    return {"sgd": torch.optim.SGD(groups, lr), "none": None}

def no_rate(groups):
    return torch.optim.SGD(groups)

def halving(step, max_steps, every=10):
    return 0.5 ** (step // every)

def to_zero(step, max_steps):
    return 1 - step / (max_steps - 1)

def bad(step, max_steps, kind):
    return 1 / 0 if kind == "raises" else {"nan": math.nan, "negative": -1.0, "text": "1"}[kind]
"""


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module ``outside_optimizers`` in the working directory."""
    (tmp_path / "outside_optimizers.py").write_text(OUTSIDE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "outside_optimizers", raising=False)


def test_groups_of_other_model_are_checked_before_a_run(outside: None) -> None:
    tree = {"data": DATA, "model": {"name": "outside_optimizers:Model"}}
    groups = [{"match": "tabel"}, {"match": "^head"}]
    job = JobConfig.model_validate({**tree, "optimizer": {"groups": groups}})
    with pytest.raises(ConfigError, match=r'groups\[0\].match: "tabel" matches no parameter') as caught:
        check_own_model(job)
    assert len(caught.value.faults) == 1
    check_own_model(JobConfig.model_validate({**tree, "optimizer": {"groups": groups[1:]}}))


def test_optimizer_of_ones_own_gets_what_config_sets(outside: None) -> None:
    optimizer = build_optimizer(
        [small_model()], config(name="outside_optimizers:Own", lr=0.2, args={"strength": 3.0}), CPU
    )
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert {(g["lr"], g["strength"]) for g in optimizer.param_groups} == {(0.2, 3.0)}
    assert "weight_decay" not in optimizer.param_groups[0]
    assert set(hyperparameters_of(optimizer)) == {
        "lr",
        "lr_scale",
        "name",
        "strength",
    }  # k is a counter: not the config's


@pytest.mark.parametrize(
    "optimizer",
    [
        {"weight_decay": 0.3},
        {"name": "lion", "betas": [0.9, 0.98], "groups": [{"match": "wq", "lr_scale": 2.0}]},
        {"name": TORCH_SGD, "args": {"momentum": 0.9}, "groups": [{"match": "w", "args": {"a": 1}}]},
    ],
)
def test_optimizer_config_reads_back_as_equal_job(tmp_path: Path, optimizer: dict[str, Any]) -> None:
    scheduler = {"name": "my_package:fn", "args": {"power": 2}}
    job = JobConfig.model_validate({"data": DATA, "optimizer": optimizer, "scheduler": scheduler})
    (tmp_path / "config.toml").write_text(job.to_toml())
    assert load_job(str(tmp_path / "config.toml")).job == job
    same = job.with_global_batch_size(8)
    assert (same.optimizer, same.scheduler) == (job.optimizer, job.scheduler)


def test_optimizer_defaults_are_those_of_adamw_only() -> None:
    assert config() == config(name="adamw", weight_decay=0.1, betas=[0.9, 0.95], eps=1e-8, fused=True)
    lion = config(name="lion")
    assert (lion.weight_decay, lion.betas, lion.eps, lion.fused) == (None, None, None, None)
    assert lion.arguments == {"lr": 3e-4}


# Arithmetic


def test_orthogonalize_is_near_the_svds_factors() -> None:
    for shape in ((40, 12), (12, 40), (20, 20)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        result = orthogonalize(matrix, steps=5, eps=1e-7).float()
        values = torch.linalg.svdvals(result)
        assert values.min() > 0.6
        assert values.max() < 1.3
        cosine = (result * (left @ right)).sum() / result.norm() / (left @ right).norm()
        assert cosine > 0.97


class Matrices(nn.Module):
    """Two matrices and a bias, with gradients that do not vanish."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.wide = nn.Parameter(torch.randn(4, 9, generator=generator))
        self.tall = nn.Parameter(torch.randn(9, 5, generator=generator))

    def forward(self, step: int) -> torch.Tensor:
        inputs = torch.randn(7, 4, generator=torch.Generator().manual_seed(step))
        return (torch.tanh(inputs @ self.wide) @ self.tall - 1).square().mean()


def losses(optimizer: torch.optim.Optimizer, model: Matrices, steps: int = 6) -> list[float]:
    """Train, with another learning rate in each step."""
    found = []
    for step in range(steps):
        loss = model(step)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.05 / (step + 1)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def compare(
    ours: type[torch.optim.Optimizer], theirs: Any, keys: dict[str, Any], their_keys: dict[str, Any]
) -> None:
    first, second = Matrices(), Matrices()
    mine = ours(first.parameters(), **{"lr": 0.05, **keys})  # type: ignore[call-arg]
    other = theirs(second.parameters(), **{"lr": 0.05, **their_keys})
    if hasattr(other, "train"):
        other.train()
    found, expected = losses(mine, first), losses(other, second)
    assert len(set(found)) == len(found)
    assert found == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close([*first.parameters()], [*second.parameters()], rtol=1e-5, atol=1e-6)
    if hasattr(other, "eval"):
        before = copy.deepcopy(first.state_dict())
        mine.eval()  # type: ignore[attr-defined]
        other.eval()
        assert not torch.equal(first.wide, before["wide"])
        torch.testing.assert_close([*first.parameters()], [*second.parameters()], rtol=1e-5, atol=1e-6)
        mine.train()  # type: ignore[attr-defined]
        torch.testing.assert_close(dict(first.named_parameters()), dict(before), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_of_plain_tensors_equals_torchs(adjust: str, nesterov: bool) -> None:
    keys = {"adjust_lr_fn": adjust, "nesterov": nesterov, "weight_decay": 0.1}
    compare(Muon, torch.optim.Muon, keys, keys)


def test_lion_of_plain_tensors_equals_the_paper() -> None:
    compare(Lion, PlainLion, {}, {})


def test_lion_decays_weights_by_learning_rate() -> None:
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.zeros(3)
    Lion([weight], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(weight, torch.full((3,), 1 - 0.1 * 0.5))


@pytest.mark.parametrize("keys", [{}, {"weight_decay": 0.1, "d": 1.5, "beta2_decay": -0.5}])
def test_adafactor_of_plain_tensors_equals_torchs(keys: dict[str, Any]) -> None:
    compare(Adafactor, torch.optim.Adafactor, keys, keys)


@pytest.mark.parametrize("keys", [{}, {"weight_decay": 0.1, "betas": (0.8, 0.95), "r": 1.0}])
def test_schedule_free_equals_the_packages(keys: dict[str, Any]) -> None:
    compare(ScheduleFreeAdamW, schedulefree.AdamWScheduleFree, keys, {**keys, "foreach": False})


def test_schedule_free_refuses_step_in_evaluation() -> None:
    model = Matrices()
    optimizer = ScheduleFreeAdamW(model.parameters())
    losses(optimizer, model, 1)
    optimizer.eval()
    model(0).backward()
    with pytest.raises(RuntimeError, match=r"call train\(\) first"):
        optimizer.step()


# Schedules


def test_schedule_of_ones_own_is_factor_on_peak(outside: None) -> None:
    scheduler = SchedulerConfig.model_validate({"name": "outside_optimizers:halving", "args": {"every": 5}})
    rates = [lr_at(step, scheduler, base_lr=2.0, max_steps=20) for step in (0, 4, 5, 10)]
    assert rates == [2.0, 2.0, 1.0, 0.5]
    stored = {"scheduler": scheduler.model_dump(), "optimizer": {}, "train": {"max_steps": 20}}
    change = learning_rate_change(stored, {**stored, "scheduler": {"name": "constant"}}, 10)
    assert change is not None
    assert (change.before, change.now, change.to_keep) == (3e-4 / 4, 3e-4, "")
    gone = {**stored, "scheduler": {"name": "outside_optimizers:gone"}}
    assert learning_rate_change(gone, stored, 10) is None


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ({"kind": "nan"}, '"outside_optimizers:bad" returned nan at step 0'),
        (
            {"kind": "negative"},
            "returned -1.0 at step 0; fn(step, max_steps, **args) returns a finite number",
        ),
        ({"kind": "text"}, "returned '1' at step 0"),
        ({"kind": "raises"}, "raised ZeroDivisionError at step 0: division by zero"),
        ({}, "scheduler.args: outside_optimizers:bad needs kind"),
        ({"kind": "nan", "knd": 1}, "scheduler.args.knd: outside_optimizers:bad has no argument knd"),
    ],
)
def test_schedule_that_returns_no_factor_is_named(outside: None, args: dict[str, Any], problem: str) -> None:
    scheduler = {"name": "outside_optimizers:bad", "args": args}
    job = JobConfig.model_validate({"data": DATA, "scheduler": scheduler})
    assert problem in str(ConfigError(plugin_issues(job)))


def test_schedule_without_value_after_its_end_is_no_fault(outside: None) -> None:
    scheduler = SchedulerConfig(name="outside_optimizers:to_zero")
    assert when_continued(scheduler, base_lr=1.0, max_steps=10, until=20) == ""
