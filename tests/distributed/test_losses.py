"""Losses: equal results and gradients in every layout, with the logits of few tokens at a time."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.ranks import RanksFailed, run_ranks
from support.tiny_model import CPU, TP_MODEL, FakeBatch, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from kempnerforge.config.schema import JobConfig
from kempnerforge.data.rows import IGNORED
from kempnerforge.train.losses.chunked_cross_entropy import chunked_cross_entropy
from kempnerforge.train.model_setup import build_model
from kempnerforge.train.z_loss import z_loss

ROOT = Path(__file__).parents[2]
VOCABULARY = 257
"""Uneven over two ranks."""
SEQ_LEN = 12
Z = 0.01
"""Coefficient of the z-loss, large enough to matter in every gradient."""
CHUNKED = {"loss": "chunked_cross_entropy", "loss_args": {"chunk_tokens": 5}}
Tree = dict[str, Any]
Found = tuple[dict[str, float], dict[str, Tensor]]


def smoothed(logits_BTV: Tensor, targets_BT: Tensor, *, amount: float) -> Tensor:
    """A user's loss of logits."""
    logits_NV = logits_BTV.float().flatten(0, 1)
    return (
        F.cross_entropy(logits_NV, targets_BT.flatten(), reduction="sum") + amount * logits_NV.square().sum()
    )


def smoothed_hidden(hidden_BTD: Tensor, targets_BT: Tensor, weight_VD: Tensor, *, amount: float) -> Tensor:
    """The same as a loss of hidden states."""
    return smoothed(F.linear(hidden_BTD, weight_VD), targets_BT, amount=amount)


smoothed_hidden.takes_hidden = True  # type: ignore[attr-defined]


DOCUMENTED: dict[str, Any] = {"torch": torch, "F": F}
"""The functions of the guide, by name."""
for block in re.findall(r"```python\n(def .*?)```", (ROOT / "docs/guide/losses.md").read_text(), re.S):
    exec(block, DOCUMENTED)
documented_focal = DOCUMENTED["focal"]
documented_soft_capped = DOCUMENTED["soft_capped"]


class Small(nn.Module):
    """A model of a user's that offers its hidden states."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width)
        self.output = nn.Linear(width, vocab_size, bias=False)

    def forward(self, tokens_BT: Tensor, head: Callable[[Tensor, Tensor], Any] | None = None) -> Any:
        x_BTD = self.tokens(tokens_BT)
        return self.output(x_BTD) if head is None else head(x_BTD, self.output.weight)


class Split(Small):
    """The same, whose output layer FSDP gathers for itself alone."""

    def fsdp_units(self) -> list[nn.Module]:
        return [self.output]


def one_step(distributed: Tree, train: Tree, tied: bool, own: str = "") -> Found:
    """Numbers of a step and of a validation, and the whole gradients of this rank's parts."""
    model = TP_MODEL.model_dump() | {"tie_embeddings": tied, "vocab_size": VOCABULARY}
    if own:
        model = {"name": f"{__name__}:{own}", "args": {"vocab_size": VOCABULARY, "width": 16}}
    tree = {
        "data": {"text": "python-stdlib"},
        "model": model,
        "distributed": distributed,
        "train": {"seq_len": SEQ_LEN, "mixed_precision": "fp32", "global_batch_size": 8, **train},
    }
    job = JobConfig.model_validate(tree)
    geometry = job.geometry(dist.get_world_size())
    placed = build_model(job, geometry, rank=dist.get_rank(), device=CPU, init_weights=True)
    optimizer = torch.optim.SGD([param for part in placed.parts for param in part.parameters()])
    step = placed.step(optimizer, geometry, job.train)
    tokens = torch.randint(VOCABULARY, (8, SEQ_LEN + 1), generator=torch.Generator().manual_seed(1))
    mine = tokens.chunk(geometry.dp)[geometry.dp_rank(dist.get_rank())]
    mine_ABT = mine.unflatten(0, (geometry.accumulation_steps, -1))
    batch = FakeBatch(mine_ABT[..., :-1], mine_ABT[..., 1:], tokens[:, 1:].numel())
    returned = step.forward_backward(batch).item()
    named = [item for part in placed.parts for item in part.named_parameters()]
    gradients = {name: whole(param.grad) for name, param in named if param.grad is not None}
    assert len(gradients) == len(named)
    result = step.update(lr=0.0)
    assert result.loss == returned
    numbers = {"loss": result.loss, "z_loss": result.z_loss, "norm": result.grad_norm}
    return {**numbers, "eval": step.evaluate([batch])}, gradients


def assert_equal(found: list[Found], expected: Found, tp: int) -> None:
    """Every rank has the same numbers, and they and the gradients are the expected ones to 1e-6.

    With tensor parallelism the products within the layers are summed in another order too.
    """
    for numbers, gradients in found:
        assert numbers == found[0][0]
        assert numbers == pytest.approx(expected[0], rel=1e-6)
        for name, gradient in gradients.items():
            wanted = expected[1][name]
            assert (gradient - wanted).norm() <= (1e-6 if tp == 1 else 3e-6) * wanted.norm(), name


@pytest.mark.parametrize(
    ("ranks", "distributed", "batch_size", "tied"),
    [
        pytest.param(1, {}, 8, False, id="one"),
        pytest.param(2, {}, 2, True, id="accumulation-tied"),
        pytest.param(4, {"dp_replicate": 2}, 1, False, id="replicas"),
        pytest.param(2, {"tp": 2}, 4, False, id="tp", marks=pytest.mark.smoke),
        pytest.param(4, {"tp": 2}, 4, True, id="tp-tied"),
        pytest.param(2, {"pp": 2}, 8, False, id="1f1b"),
        pytest.param(2, {"pp": 2, "pp_schedule": "gpipe", "pp_microbatch_size": 2}, 8, False, id="gpipe"),
        pytest.param(4, {"pp": 2, "tp": 2}, 8, False, id="pp-tp"),
    ],
)
def test_losses_are_equal_in_every_layout(ranks: int, distributed: Tree, batch_size: int, tied: bool) -> None:
    for coefficient in (0.0, Z):
        [expected] = run_ranks(one_step, 1, {}, {"batch_size": 8, "z_loss": coefficient}, tied)
        assert (expected[0]["z_loss"] > 0.05) == (coefficient > 0)
        for loss in ({}, CHUNKED):
            train = {"batch_size": batch_size, "z_loss": coefficient, **loss}
            found = run_ranks(one_step, ranks, distributed, train, tied)
            assert_equal(found, expected, distributed.get("tp", 1))


def sharded_loss(recompute: bool, gathered: bool) -> None:
    """A loss whose weight is sharded over all ranks, against the plain one on every rank."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 12, 8, generator=generator).requires_grad_()
    weight = torch.randn(VOCABULARY, 8, generator=generator).requires_grad_()
    targets = torch.randint(VOCABULARY, (2, 12), generator=generator)
    targets[0, :2] = IGNORED
    logits = F.linear(hidden, weight).flatten(0, 1)
    z = Z * logits.logsumexp(-1)[2:].square().sum()
    plain = F.cross_entropy(logits, targets.flatten(), reduction="sum")
    expected = torch.autograd.grad(plain + z, (hidden, weight), retain_graph=True)
    placement = Replicate() if gathered else Shard(1)
    hidden_part = distribute_tensor(hidden.detach(), mesh, [placement]).requires_grad_()
    weight_part = distribute_tensor(weight.detach(), mesh, [Shard(0)]).requires_grad_()
    options = {"chunk_tokens": 5, "recompute": recompute, "z_loss": Z}
    found, found_z = chunked_cross_entropy(hidden_part, targets, weight_part, **options)
    assert (found.item(), found_z.item()) == pytest.approx((plain.item(), z.item()), rel=1e-6)
    for gradient, wanted in zip(
        torch.autograd.grad(found, (hidden_part, weight_part)), expected, strict=True
    ):
        assert (whole(gradient) - wanted).norm() <= 1e-6 * wanted.norm()
    part = distribute_tensor(logits.detach().unflatten(0, (2, 12)), mesh, [Shard(2)]).requires_grad_()
    found_z = z_loss(part, targets, Z)
    assert found_z.item() == pytest.approx(z.item(), rel=1e-6)
    [gradient] = torch.autograd.grad(found_z, part)
    [wanted] = torch.autograd.grad(z, logits)
    assert (whole(gradient).flatten(0, 1) - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.smoke
@pytest.mark.parametrize("ranks", [2, 3])
def test_losses_of_sharded_vocabulary_equal_torch(ranks: int) -> None:
    run_ranks(sharded_losses, ranks)


def sharded_losses() -> None:
    for recompute, gathered in itertools.product([False, True], repeat=2):
        sharded_loss(recompute, gathered)


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"pp": 2}], ids=["dp", "tp", "pp"])
def test_own_losses_are_equal_in_every_layout(layout: Tree) -> None:
    own = {"loss": f"{__name__}:smoothed", "loss_args": {"amount": 0.1}, "batch_size": 4}
    [expected] = run_ranks(one_step, 1, {}, own, False)
    for name in ("smoothed", "smoothed_hidden"):
        found = run_ranks(one_step, 2, layout, own | {"loss": f"{__name__}:{name}"}, False)
        assert_equal(found, expected, layout.get("tp", 1))


@pytest.mark.parametrize("name", ["documented_focal", "documented_soft_capped"])
def test_documented_losses_are_equal_under_tp(name: str) -> None:
    own = {"loss": f"{__name__}:{name}", "batch_size": 4}
    [expected] = run_ranks(one_step, 1, {}, own, False)
    assert_equal(run_ranks(one_step, 2, {"tp": 2}, own, False), expected, 2)


def test_chunked_loss_of_own_model_is_equal() -> None:
    [expected] = run_ranks(one_step, 1, {}, {"batch_size": 8, "z_loss": Z}, False, "Small")
    train = {"batch_size": 4, "z_loss": Z, **CHUNKED}
    assert_equal(run_ranks(one_step, 2, {}, train, False, "Small"), expected, 1)
    with pytest.raises(RanksFailed, match="leave the output layer out of fsdp_units"):
        run_ranks(one_step, 2, {}, train, False, "Split")
