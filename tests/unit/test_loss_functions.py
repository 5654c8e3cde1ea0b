"""Losses by themselves: the numbers of torch, in chunks, and what is refused."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.live_storages import LiveStorages
from torch import Tensor, nn

from kempnerforge.config.job import JobConfig, validate_tree
from kempnerforge.config.plugin_uses import plugin_issues
from kempnerforge.config.rules import LOSS_ARGUMENTS
from kempnerforge.config.schema import DistributedConfig, TrainConfig
from kempnerforge.data.rows import IGNORED
from kempnerforge.errors import ConfigError
from kempnerforge.plugins import built_in_names, resolve
from kempnerforge.train.loss import Loss, LossSums, build_loss
from kempnerforge.train.losses.chunked_cross_entropy import chunked_cross_entropy
from kempnerforge.train.losses.cross_entropy import cross_entropy
from kempnerforge.train.z_loss import z_loss

TOKENS, WIDTH, VOCABULARY = 24, 16, 301
Z = 0.01

OWN = """
def of_logits(logits, targets):
    return logits.sum()

def of_hidden(hidden, targets, weight, *, scale=1.0):
    return hidden.sum()

of_hidden.takes_hidden = True

def of_hidden_with_z(hidden, targets, weight, *, z_loss=0.0):
    return hidden.sum()

of_hidden_with_z.takes_hidden = True

class Model:
    def __init__(self, width):
        self.width = width

    def forward(self, tokens):
        return tokens

class ModelWithHead(Model):
    def forward(self, tokens, head=None):
        return tokens
"""


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, the weight of an output layer, and targets, of which some are ignored."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, TOKENS // 2, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (2, TOKENS // 2), generator=generator)
    targets[0, 3] = targets[1, :7] = IGNORED
    return hidden, weight, targets


def reference(hidden: Tensor, weight: Tensor, targets: Tensor, coefficient: float) -> tuple[Tensor, Tensor]:
    """The loss and the z-loss, by torch's own functions."""
    logits = F.linear(hidden, weight).float().flatten(0, 1)
    z = coefficient * logits.logsumexp(-1)[targets.flatten() != IGNORED].square().sum()
    return F.cross_entropy(logits, targets.flatten(), reduction="sum"), z


def gradients_of(loss: Tensor, *given: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss / TOKENS, given))


def error_of(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize("chunk_tokens", [1, 5, 8, 24, 1000])
@pytest.mark.parametrize("coefficient", [0.0, Z])
@pytest.mark.parametrize("recompute", [False, True])
def test_chunked_cross_entropy_equals_torch(chunk_tokens: int, coefficient: float, recompute: bool) -> None:
    hidden, weight, targets = inputs()
    loss, z = reference(hidden, weight, targets, coefficient)
    expected = gradients_of(loss + z, hidden, weight)
    options = {"chunk_tokens": chunk_tokens, "recompute": recompute, "z_loss": coefficient}
    found, found_z = chunked_cross_entropy(hidden, targets, weight, **options)
    assert (found.item(), found_z.item()) == pytest.approx((loss.item(), z.item()), rel=1e-6)
    for gradient, wanted in zip(gradients_of(found, hidden, weight), expected, strict=True):
        assert error_of(gradient, wanted) < 1e-6
    with torch.no_grad():
        assert chunked_cross_entropy(hidden, targets, weight, **options) == (found, found_z)


def test_z_loss_of_logits_equals_torch() -> None:
    hidden, weight, targets = inputs()
    loss, z = reference(hidden, weight, targets, Z)
    logits = F.linear(hidden, weight)
    found = z_loss(logits, targets, Z)
    assert found.item() == pytest.approx(z.item(), rel=1e-6)
    for gradient, wanted in zip(
        gradients_of(found, hidden, weight), gradients_of(z, hidden, weight), strict=True
    ):
        assert error_of(gradient, wanted) < 1e-6
    sums = Loss(z_loss=Z).of_output(logits, targets)
    assert sums.reported.tolist() == pytest.approx([loss.item(), z.item()], rel=1e-6)
    assert Loss().of_output(logits, targets).reported == loss.detach()


def of_sources(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor, sources: list[int]) -> LossSums:
    """The sums of a loss of logits or of hidden states, for rows of these sources."""
    if not loss.takes_hidden:
        return loss.of_output(F.linear(hidden, weight), targets, sources)
    loss.forward_options["head"](hidden, weight)
    return loss.of_output(hidden, targets, sources)


@pytest.mark.parametrize(
    "loss",
    [
        Loss(),
        Loss(z_loss=Z),
        Loss(chunked_cross_entropy, {"chunk_tokens": 5}),
        Loss(chunked_cross_entropy, {"chunk_tokens": 5, "recompute": True}, Z),
    ],
    ids=["plain", "z", "chunked", "recomputed-z"],
)
@pytest.mark.parametrize("sources", [[1, 1, 1, 1], [0, 2, 2, 0]])
def test_rows_of_sources_add_up_to_the_loss(loss: Loss, sources: list[int]) -> None:
    hidden, weight, targets = inputs()
    hidden, targets = hidden.detach().reshape(4, -1, WIDTH).requires_grad_(), targets.reshape(4, -1)
    whole, z = reference(hidden, weight, targets, loss.z_loss)
    expected = gradients_of(whole + z, hidden, weight)
    sums = of_sources(loss, hidden, weight, targets, sources)
    for gradient, wanted in zip(gradients_of(sums.total, hidden, weight), expected, strict=True):
        assert error_of(gradient, wanted) < 1e-6
    assert sums.rows is not None
    assert sums.reported.reshape(-1)[0].item() == pytest.approx(whole.item(), rel=1e-6)
    for source in range(3):
        keep = torch.tensor(sources) == source
        wanted, _ = reference(hidden[keep], weight, targets[keep], 0)
        assert sums.rows[keep].sum().item() == pytest.approx(wanted.item(), rel=1e-6)


def test_chunked_loss_of_sources_keeps_one_weight_gradient() -> None:
    hidden = torch.randn(4, 128, 8, requires_grad=True)
    weight = torch.randn(1000, 8, requires_grad=True)
    targets = torch.zeros(4, 128, dtype=torch.int64)
    peaks = []
    for sources in ([0, 0, 0, 0], [0, 1, 0, 1]):
        with LiveStorages() as live:
            of_sources(Loss(chunked_cross_entropy, {"chunk_tokens": 32}), hidden, weight, targets, sources)
        peaks.append(live.peak)
    assert peaks[0] == peaks[1]


def raises_on_ignored(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.gather(-1, targets[..., None]).sum()


def counts_ignored(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.sum() + torch.rand(()) * 0


def leaves_out_ignored(hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    return (F.linear(hidden, weight).sum(-1) * (targets != IGNORED)).sum()


leaves_out_ignored.takes_hidden = True  # type: ignore[attr-defined]


def needs_all_logits(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.unflatten(-1, (VOCABULARY,)).sum()


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (
            raises_on_ignored,
            "targets of -100 count nothing, but own raises RuntimeError: index",
        ),
        (counts_ignored, "but own counts it; leave such targets out of its sum"),
        (leaves_out_ignored, None),
        (needs_all_logits, None),
        (chunked_cross_entropy, None),
        (cross_entropy, None),
    ],
)
def test_loss_that_cannot_ignore_targets_is_named(
    function: Callable[..., Tensor], problem: str | None
) -> None:
    loss, before = Loss(function, name="own"), torch.get_rng_state()
    if problem is None:
        loss.check_function(with_ignored=True)
    else:
        with pytest.raises(ConfigError) as error:
            loss.check_function(with_ignored=True)
        assert problem in str(error.value)
        assert error.value.agreed
    assert torch.equal(torch.get_rng_state(), before)


def loss_of_each_token(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")


def no_loss(logits: Tensor, targets: Tensor) -> None:
    """Its result was forgotten."""


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("with_ignored", [False, True])
@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (loss_of_each_token, "train.loss: own returned a tensor [2]; a loss is the sum over all tokens"),
        (no_loss, "train.loss: own returned a NoneType; a loss is the sum over all tokens"),
        (mean_loss, "train.loss: own returned a mean; return the sum"),
    ],
)
def test_loss_that_is_no_sum_is_named(function: Callable[..., Any], problem: str, with_ignored: bool) -> None:
    with pytest.raises(ConfigError) as error:
        Loss(function, name="own").check_function(with_ignored=with_ignored)
    assert problem in str(error.value)
    assert error.value.agreed
    assert error.value.exit_status == 2


def test_chunked_cross_entropy_bf16_is_as_precise() -> None:
    """Each gradient's error is at most that of the plain loss, against fp64."""
    hidden, weight, targets = inputs(torch.bfloat16)
    exact = [one.detach().double().requires_grad_() for one in (hidden, weight)]
    logits = F.linear(*exact).flatten(0, 1)
    expected = gradients_of(F.cross_entropy(logits, targets.flatten(), reduction="sum"), *exact)
    plain = gradients_of(reference(hidden, weight, targets, 0)[0], hidden, weight)
    chunked = gradients_of(chunked_cross_entropy(hidden, targets, weight, chunk_tokens=5)[0], hidden, weight)
    for found, other, wanted in zip(chunked, plain, expected, strict=True):
        assert found.dtype == torch.bfloat16
        assert error_of(found, wanted) <= error_of(other, wanted)


@pytest.mark.parametrize("recompute", [False, True])
def test_chunked_cross_entropy_holds_logits_of_a_chunk(recompute: bool) -> None:
    hidden = torch.randn(1, 512, 8, requires_grad=True)
    weight = torch.randn(1000, 8, requires_grad=True)
    targets = torch.zeros(1, 512, dtype=torch.int64)
    with LiveStorages() as live:
        loss, _ = chunked_cross_entropy(hidden, targets, weight, chunk_tokens=32, recompute=recompute)
        loss.backward()
    logits = 4 * 32 * 1000
    others = 4 * 2 * (hidden.numel() + weight.numel())
    assert logits < live.peak < others + 1.3 * logits


def test_chunked_cross_entropy_frozen_weight_has_no_gradient() -> None:
    hidden, weight, targets = inputs()
    expected = gradients_of(reference(hidden, weight, targets, 0)[0], hidden)
    loss, _ = chunked_cross_entropy(hidden, targets, weight.detach(), chunk_tokens=5)
    assert error_of(gradients_of(loss, hidden)[0], expected[0]) < 1e-6


def test_chunked_cross_entropy_second_backward_raises() -> None:
    hidden, weight, targets = inputs()
    loss, _ = chunked_cross_entropy(hidden, targets, weight)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used by an earlier backward"):
        loss.backward()


def test_loss_argument_names_match_signatures() -> None:
    assert set(built_in_names("loss")) == set(LOSS_ARGUMENTS)
    for name, known in LOSS_ARGUMENTS.items():
        parameters = inspect.signature(resolve("loss", name, key="train.loss").target).parameters.values()
        takes = {one.name for one in parameters if one.kind is one.KEYWORD_ONLY}
        assert takes - {"z_loss", "row_losses"} == set(known)


@pytest.mark.parametrize(
    ("train", "problem"),
    [
        ({"loss_args": {"chunk_tokens": 3}}, "cross_entropy has no argument chunk_tokens; it takes: none"),
        ({"loss": "chunked_cross_entropy", "loss_args": {"chunk_tokens": 0}}, "0 is too small"),
        ({"loss": "chunked_cross_entropy", "loss_args": {"chunk_tokens": "x"}}, "'x' is not an integer"),
        ({"loss": "chunked_cross_entropy", "loss_args": {"recompute": 1}}, "1 is not true or false"),
        ({"loss_args": {"z_loss": 1.0}}, "has a key of its own; set train.z_loss"),
    ],
)
def test_loss_arguments_with_mistake_are_refused(train: dict[str, object], problem: str) -> None:
    _, issues = validate_tree({"train": train, "data": {"text": "python-stdlib"}})
    assert [problem in str(issue) for issue in issues] == [True], issues


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with losses and models of a user's."""
    (tmp_path / "outside_losses.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "outside_losses", raising=False)
    return "outside_losses"


@pytest.mark.parametrize(
    ("train", "model", "problem"),
    [
        ({"loss": "of_logits", "z_loss": 0.1}, None, None),
        ({"loss": "of_hidden", "loss_args": {"scale": 2}}, None, None),
        ({"loss": "of_hidden", "loss_args": {"scael": 2}}, None, "has no argument scael"),
        ({"loss": "of_hidden", "z_loss": 0.1}, None, "has no argument z_loss, so there are no logits"),
        ({"loss": "of_hidden_with_z", "z_loss": 0.1}, None, None),
        ({"loss": "of_hidden"}, "Model", "Model.forward has no argument head"),
        ({"loss": "of_hidden"}, "ModelWithHead", None),
        ({"loss": "of_logits"}, "Model", None),
        ({"loss": "chunked_cross_entropy"}, "Model", "Model.forward has no argument head"),
    ],
)
def test_own_loss_that_cannot_work_is_refused(
    own: str, train: dict[str, object], model: str | None, problem: str | None
) -> None:
    names = {"loss": train["loss"] if "chunked" in str(train["loss"]) else f"{own}:{train['loss']}"}
    tree = {"train": train | names, "data": {"text": "python-stdlib"}}
    if model is not None:
        tree["model"] = {"name": f"{own}:{model}", "args": {"width": 3}}
    issues = plugin_issues(JobConfig.model_validate(tree))
    if problem is None:
        assert issues == []
    else:
        assert [problem in str(issue) for issue in issues] == [True], issues


def test_build_loss_refuses_what_config_check_refuses(own: str) -> None:
    with pytest.raises(ConfigError, match="no argument z_loss"):
        build_loss(TrainConfig(loss=f"{own}:of_hidden", z_loss=0.1), DistributedConfig())
    loss = build_loss(TrainConfig(loss=f"{own}:of_hidden"), DistributedConfig())
    with pytest.raises(ConfigError, match=r"Linear.forward has no argument head"):
        loss.check_model(nn.Linear(1, 1))
    hidden, weight, targets = inputs()
    loss = build_loss(TrainConfig(loss=f"{own}:of_hidden_with_z", z_loss=0.1), DistributedConfig())
    loss.forward_options["head"](hidden, weight)
    with pytest.raises(TypeError, match=r"must return \(loss, z-loss\)"):
        loss.of_output(hidden, targets)


def test_build_loss_gpipe_recomputes_by_default() -> None:
    train = TrainConfig(loss="chunked_cross_entropy")
    schedules = {name: DistributedConfig.model_validate({"pp_schedule": name}) for name in ("1f1b", "gpipe")}
    assert {name: build_loss(train, one).args["recompute"] for name, one in schedules.items()} == {
        "1f1b": False,
        "gpipe": True,
    }
    chosen = TrainConfig(loss="chunked_cross_entropy", loss_args={"recompute": False})
    assert build_loss(chosen, schedules["gpipe"]).args["recompute"] is False
