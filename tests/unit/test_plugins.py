"""Names in a config that stand for callables: where they are found, and what is said of mistakes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
import tomli
from typer.testing import CliRunner

from kempnerforge import plugins
from kempnerforge.cli.app import app
from kempnerforge.cli.step_config import refuse_plugins_of_others
from kempnerforge.config.job import JobConfig, validate_tree
from kempnerforge.config.model_changes import model_changes
from kempnerforge.config.plugin_uses import plugin_identities, plugin_issues
from kempnerforge.config.schema import load_job
from kempnerforge.config.toml_text import render
from kempnerforge.errors import ConfigError

if TYPE_CHECKING:
    from kempnerforge.checkpoint.format.step_info import StepView

SOURCE = """
import torch

class Wide(torch.nn.Module):
    def __init__(self, width, *, depth=2):
        super().__init__()
        self.table = torch.nn.Embedding(257, 257)

    def forward(self, tokens):
        return self.table(tokens)

def anything(**kwargs):
    return kwargs

NUMBER = 3
"""

TOML = """
[model]
name = "{name}"
args = {args}

[data]
text = "python-stdlib"
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with plug-ins, in the working directory."""
    (tmp_path / "outside_models.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "outside_models", raising=False)
    return "outside_models"


def check(folder: Path, name: str, args: str = "{}") -> tuple[int, str]:
    (folder / "own.toml").write_text(TOML.format(name=name, args=args))
    result = CliRunner().invoke(app, ["config", "check", "own.toml"])
    return result.exit_code, result.output if result.exception is None else str(result.exception)


def test_plugin_path_in_working_directory_is_found(module: str, tmp_path: Path) -> None:
    plugin = plugins.resolve("model", f"{module}:Wide", key="model.name")
    assert plugin.target.__name__ == "Wide"
    assert plugin.origin == str(tmp_path / "outside_models.py")
    (tmp_path / "outside_models.py").write_text(f"{SOURCE}\n# changed\n")
    assert plugins.resolve("model", f"{module}:Wide", key="model.name").digest != plugin.digest


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("lama", '"lama" is not a known model; did you mean "llama"?'),
        ("outside_modls:Wide", "there is no module outside_modls"),
        ("outside_models:Wid", 'outside_models has no Wid; did you mean "Wide"?'),
        ("outside_models:NUMBER", '"outside_models:NUMBER" is of type int'),
        ("outside_models:NUMBER.x", '"outside_models:NUMBER.x": outside_models has no NUMBER.x'),
        ("outside_models:", "is not an import path"),
        ("broken_models:Wide", "cannot be imported: ZeroDivisionError: division by zero; see "),
        ("leaving_models:Wide", "cannot be imported: SystemExit: 3; see "),
        ("lacking_models:Wide", "cannot be imported: ModuleNotFoundError: No module named 'absent_package'"),
    ],
)
def test_plugin_name_with_mistake_is_explained(module: str, tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / "broken_models.py").write_text("1 / 0\n")
    (tmp_path / "leaving_models.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "lacking_models.py").write_text("import absent_package\n")
    with pytest.raises(ConfigError) as error:
        plugins.resolve("model", name, key="model.name")
    assert problem in str(error.value)


def test_plugin_arguments_are_compared_with_signature(module: str) -> None:
    plugin = plugins.resolve("model", f"{module}:Wide", key="model.name")
    assert plugins.argument_issues(plugin, {"width": 3}, key="model.args") == []
    [unknown, missing] = plugins.argument_issues(plugin, {"dept": 3}, key="model.args")
    assert str(unknown) == (
        f'model.args.dept: {module}:Wide has no argument dept; did you mean "depth"? it takes: width, depth'
    )
    assert str(missing) == f"model.args: {module}:Wide needs width; set model.args.width"
    assert plugins.argument_issues(plugin, {"depth": 3}, key="model.args", given=1) == []
    anything = plugins.resolve("model", f"{module}:anything", key="model.name")
    assert plugins.argument_issues(anything, {"x": 3}, key="model.args") == []


def test_plugin_of_entry_point_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    info = tmp_path / "outside-1.4.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.4\n")
    (info / "entry_points.txt").write_text(f"[{plugins.GROUP}]\nwide = {module}:Wide\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert plugins.resolve("model", "wide", key="model.name").target.__name__ == "Wide"


def test_config_check_plugin_typo_exits_2(module: str, tmp_path: Path) -> None:
    _, output = check(tmp_path, f"{module}:Wide", "{width = 2, deph = 1}")
    assert "model.args.deph" in output
    assert "own.toml" in output
    assert check(tmp_path, f"{module}:Wide", "{width = 2}")[0] == 0
    (tmp_path / "own.toml").write_text(TOML.format(name="absent_models:Wide", args="{}"))
    skipped = CliRunner().invoke(app, ["config", "check", "own.toml", "--no-plugins"])
    assert skipped.exit_code == 0, skipped.output


def test_config_show_names_plugins(module: str, tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(TOML.format(name=f"{module}:Wide", args="{width = 2}"))
    shown = CliRunner().invoke(app, ["config", "show", "own.toml"]).output
    assert f"# model.name: {module}:Wide ({tmp_path / 'outside_models.py'}, source " in shown
    assert "dim = " not in shown


def test_own_model_table_round_trips(module: str, tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(
        TOML.format(name=f"{module}:Wide", args='{width = 2, x = {"a b" = [1]}}')
    )
    job = load_job(tmp_path / "own.toml", ["--model.args.width=5"]).job
    assert job.model.args == {"width": 5, "x": {"a b": [1]}}
    (tmp_path / "again.toml").write_text(job.to_toml())
    assert load_job(tmp_path / "again.toml").job == job
    assert job.with_global_batch_size(8).model == job.model


def test_own_model_without_args_is_rebuilt_from_set_keys(module: str, tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(TOML.format(name=f"{module}:Wide", args="{}").replace("args = {}", ""))
    job = load_job(tmp_path / "own.toml").job
    assert job.with_global_batch_size(8).model == job.model


def test_own_model_with_keys_of_llama_is_refused() -> None:
    _, issues = validate_tree({"model": {"name": "a:B", "dim": 3}, "data": {"text": "python-stdlib"}})
    assert [str(issue) for issue in issues] == [
        'model.dim: is a key of "llama", and model.name is "a:B"; write model.args.dim'
    ]
    _, issues = validate_tree({"model": {"args": {"dim": 3}}, "data": {"text": "python-stdlib"}})
    assert issues[0].key == "model.args"


def test_plugin_uses_leave_out_built_in_names() -> None:
    job = JobConfig.model_validate({"data": {"text": "python-stdlib"}})
    assert plugin_issues(job) == []
    assert plugin_identities(job) == {}
    assert plugins.built_in_names("model") == ("llama",)


def test_model_changes_of_own_model_are_named() -> None:
    was = {"name": "a:B", "args": {"width": 2, "depth": 1}}
    assert model_changes(was, was).lines == ()
    now = {"name": "a:B", "args": {"width": 2, "heads": 4}}
    changes = model_changes(was, now)
    assert changes.lines == ("model.args.depth was 1, is none", "model.args.heads was none, is 4")
    assert changes.same_shapes
    assert not model_changes(was, {"name": "llama"}).same_shapes
    assert model_changes({"dim": 256}, {"name": "llama"}).lines == ()


def test_render_lists_of_tables_read_back() -> None:
    tree = {
        "hooks": [{"name": "a:B", "args": {"x": 1, "y z": {"q": []}}}, {"name": "c"}],
        "run": {"name": "r"},
    }
    assert tomli.loads(render(tree)) == tree


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_plugins_in_config_of_another_user_are_refused(module: str, tmp_path: Path) -> None:
    """``eval`` and ``generate`` would run the code that such a config names."""
    step = tmp_path / "step_00000001"
    step.mkdir()
    config = step / "config.toml"
    config.write_text(TOML.format(name=f"{module}:Wide", args="{width = 2}"))
    view = SimpleNamespace(path=step)
    loaded = load_job(config)
    refuse_plugins_of_others(loaded, cast("StepView", view))
    os.chown(config, 4321, -1)
    with pytest.raises(ConfigError, match=f"--model.name={module}:Wide"):
        refuse_plugins_of_others(loaded, cast("StepView", view))
    named = load_job(config, [f"--model.name={module}:Wide"])
    refuse_plugins_of_others(named, cast("StepView", view))
