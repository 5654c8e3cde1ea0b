"""What is found in a model of the user's before a run is queued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.own_models import Plain, Planned, Tied
from torch import Tensor, nn
from typer.testing import CliRunner

from kempnerforge.cli.app import app
from kempnerforge.config.job import JobConfig
from kempnerforge.errors import ConfigError
from kempnerforge.train.own_model import check_own_model, plan_parameters


class BadStages(Planned):
    def pipeline_stages(self, count: int) -> list[nn.Module]:
        return [self.blocks["9"]] * count


class NoStages(Planned):
    def pipeline_stages(self, count: int) -> list[nn.Module]:
        return None  # type: ignore[return-value]


class BadUnits(Planned):
    def fsdp_units(self) -> list[nn.Module]:
        return [self.missing]  # type: ignore[list-item]


class TextUnits(Planned):
    def fsdp_units(self) -> list[nn.Module]:
        return [["blocks"]]  # type: ignore[list-item]


class BadPlan(Planned):
    def tp_plan(self) -> dict[str, object]:
        raise RuntimeError("no plan today")


class NoPlan(Planned):
    def tp_plan(self) -> dict[str, object]:
        return None  # type: ignore[return-value]


class BadBytes(Plain):
    def activation_bytes(self, batch_size: int) -> int:
        return batch_size


class TiedUnits(Tied):
    def fsdp_units(self) -> list[nn.Module]:
        return [*self.layers, self.head]


class SharedWeight(Plain):
    def __init__(self) -> None:
        super().__init__()
        second = self.get_submodule("layers.1.norm")
        second.weight = self.get_submodule("layers.0.norm").weight


class SharedModule(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.layers[1].norm = self.layers[0].norm


class NestedUnits(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.first = self.layers[0]

    def fsdp_units(self) -> list[nn.Module]:
        return [self.get_submodule("layers.0.qkv"), *self.layers]


class WithDocuments(Plain):
    def forward(self, tokens: Tensor, document_ids: Tensor | None = None) -> Tensor:
        return super().forward(tokens)


class StagesWithoutDocuments(Planned):
    """Its stages are of its base class."""

    def forward(self, x: Tensor, document_ids: Tensor | None = None) -> Tensor:
        return super().forward(x)


class OwnLoss(Plain):
    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        return self(batch["tokens"]).sum(), batch["document_ids"].numel()


def job_of(model: type[nn.Module], **distributed: int) -> JobConfig:
    tree: dict[str, Any] = {"model": {"name": f"{__name__}:{model.__name__}"}, "distributed": distributed}
    return JobConfig.model_validate({**tree, "data": {"text": "python-stdlib"}, "train": {"seq_len": 32}})


@pytest.mark.parametrize(
    ("model", "layout", "problem"),
    [
        (BadStages, {"pp": 2}, "BadStages.pipeline_stages(2) raised KeyError: '9'; see "),
        (NoStages, {"pp": 2}, "NoStages.pipeline_stages(2) raised TypeError: 'NoneType' object is not"),
        (BadUnits, {}, "fsdp_units() of BadUnits raised AttributeError: 'BadUnits' object has no attribute"),
        (TextUnits, {}, "fsdp_units() returned list, which is no submodule"),
        (BadPlan, {"tp": 2}, f"tp_plan() of BadPlan raised RuntimeError: no plan today; see {__file__}:"),
        (NoPlan, {"tp": 2}, "tp_plan() of NoPlan raised TypeError: 'NoneType' object is not"),
        (
            TiedUnits,
            {},
            "tokens.weight is shared by head and the rest of the model, which are sharded one by one; let",
        ),
        (SharedWeight, {}, "layers.0.norm.weight is shared by layers.0 and layers.1, which are"),
        (SharedModule, {}, "layers.0.norm.bias is shared by layers.0 and layers.1, which are"),
    ],
)
def test_own_model_with_mistake_is_explained(
    model: type[nn.Module], layout: dict[str, int], problem: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_own_model(job_of(model, **layout))
    assert problem in str(caught.value)
    assert {issue.key for issue in caught.value.faults} == {"model.name"}


@pytest.mark.parametrize("model", [Plain, Tied, NestedUnits])
def test_own_model_without_shared_units_passes(model: type[nn.Module]) -> None:
    assert check_own_model(job_of(model)).num_blocks == 2 + (model is NestedUnits)


def test_own_model_activation_bytes_error_is_explained() -> None:
    with pytest.raises(ConfigError, match=r"activation_bytes\(\) of .*:BadBytes raised TypeError: "):
        plan_parameters(job_of(BadBytes))


def masked(model: type[nn.Module], **distributed: int) -> JobConfig:
    job = job_of(model, **distributed)
    return job.model_copy(update={"data": job.data.model_copy(update={"document_mask": True})})


@pytest.mark.parametrize(
    ("model", "layout", "culprit"), [(Plain, {}, "Plain"), (StagesWithoutDocuments, {"pp": 2}, "Planned")]
)
def test_own_model_without_document_ids_refused(
    model: type[nn.Module], layout: dict[str, int], culprit: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_own_model(masked(model, **layout))
    [issue] = caught.value.faults
    assert issue.key == "data.document_mask"
    assert f"forward() of {culprit} ({__name__}:{model.__name__}) has no argument document_ids" in str(issue)
    assert "forward(self, tokens, document_ids=None)" in str(issue)


@pytest.mark.parametrize("model", [WithDocuments, OwnLoss])
def test_own_model_that_takes_documents_passes(model: type[nn.Module]) -> None:
    assert check_own_model(masked(model)).num_blocks == 2


@pytest.mark.parametrize(
    "command", ["config check", "plan --world-size=2", "submit --nodes=2 --time=1:00:00 --dry-run"]
)
def test_own_model_error_ends_command_in_config_error(tmp_path: Path, command: str) -> None:
    file = tmp_path / "own.toml"
    file.write_text(job_of(BadPlan, tp=2).to_toml())
    ended = CliRunner().invoke(app, [*command.split(), str(file)])
    assert isinstance(ended.exception, ConfigError), ended.output
    assert "raised RuntimeError: no plan today" in str(ended.exception)
