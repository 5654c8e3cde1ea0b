"""``plan`` knows the state of every optimizer, or says that it does not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from support.patch_target import patch_target
from typer.testing import CliRunner

from kempnerforge.cli.app import app
from kempnerforge.config.job import JobConfig
from kempnerforge.config.schema import OptimizerConfig
from kempnerforge.plan.optimizer_state import BUILT_IN, OptimizerState, ParameterState
from kempnerforge.plan.report import make_plan
from kempnerforge.plugins import built_in_names
from kempnerforge.train.optimizer_probe import probe

TORCH_ADAMW = patch_target("torch.optim:AdamW")
TORCH_RMSPROP = patch_target("torch.optim:RMSprop")
TOML = """
[data]
text = "python-stdlib"
[optimizer]
name = "{name}"
"""


def in_order(state: OptimizerState) -> list[tuple[str, list[Any]]]:
    kinds: list[ParameterState] = [state.hidden, state.matrices, state.vectors]
    return [(kind.prefix, sorted(kind.tensors)) for kind in kinds]


WITH_ARGS = [("sgd", {"momentum": 0.9}), ("adamw", {"amsgrad": True})]


@pytest.mark.parametrize(
    ("name", "args"), [*((name, {}) for name in built_in_names("optimizer")), *WITH_ARGS]
)
def test_plan_state_of_own_optimizers_is_the_real_one(name: str, args: dict[str, Any]) -> None:
    probed = probe(OptimizerConfig.model_validate({"name": name, "args": args}))
    assert not probed.problem
    assert in_order(probed) == in_order(BUILT_IN[name](args))


def plan_of(name: str, **tree: Any) -> Any:
    optimizer = {"name": name, **tree}
    job = JobConfig.model_validate({"data": {"text": "python-stdlib"}, "optimizer": optimizer})
    return make_plan(job, 2, probed=None if name in BUILT_IN else probe(job.optimizer))


def test_plan_memory_follows_the_optimizer() -> None:
    adamw, lion, muon, sgd = (plan_of(name) for name in ("adamw", "lion", "muon", "sgd"))
    bytes_of = {
        plan.job.optimizer.name: plan.pipeline[0].memory.optimizer for plan in (adamw, lion, muon, sgd)
    }
    assert bytes_of["adamw"] == 2 * bytes_of["lion"] == 2 * adamw.pipeline[0].memory.weights
    assert bytes_of["lion"] < bytes_of["muon"] < bytes_of["adamw"]
    assert bytes_of["sgd"] == 0
    heavy = plan_of("sgd", groups=[{"match": "wq", "args": {"momentum": 0.9}}])
    assert heavy.pipeline[0].memory.optimizer == 4 * 4 * 256 * 256 // 2
    assert (
        plan_of("muon", groups=[{"match": "layers", "hidden": False}]).pipeline[0].memory.optimizer
        == (bytes_of["adamw"])
    )


def test_plan_finds_state_of_other_optimizers() -> None:
    assert plan_of(TORCH_RMSPROP).pipeline[0].memory.optimizer == (
        plan_of("lion").pipeline[0].memory.optimizer
    )
    assert plan_of(TORCH_ADAMW).checkpoint == plan_of("adamw").checkpoint


def test_plan_says_that_state_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "odd_optimizers.py").write_text(
        "import torch\n"
        "class Odd(torch.optim.SGD):\n"
        "    def step(self):\n"
        "        for group in self.param_groups:\n"
        "            for param in group['params']:\n"
        "                self.state[param]['history'] = torch.zeros(17)\n"
    )
    (tmp_path / "odd.toml").write_text(TOML.format(name="odd_optimizers:Odd"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    shown = CliRunner().invoke(app, ["plan", "odd.toml", "--world-size", "2"])
    assert shown.exit_code == 0
    assert (
        "the state of odd_optimizers:Odd is not known and not counted: its history has shape (17,)"
        in shown.output
    )
    (tmp_path / "odd.toml").write_text(TOML.format(name="odd_optimizers:Gone"))
    shown = CliRunner().invoke(app, ["plan", "odd.toml", "--world-size", "2"])
    assert "not counted: optimizer.name: " in shown.output
