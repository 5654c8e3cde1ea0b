"""Models that compute their own loss: the step equals plain torch, whatever the layout."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.ranks import RanksFailed, run_ranks
from support.tiny_model import CPU, FakeBatch, train_config, whole
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from kempnerforge.data.rows import IGNORED
from kempnerforge.distributed.mesh import build_mesh
from kempnerforge.model.sharding import local_box
from kempnerforge.parallel.shard import materialize, parallelize
from kempnerforge.train.loss_step import LossStep
from kempnerforge.train.step import UpdateResult

GLOBAL_BATCH, STEPS, WIDTH = 8, 3, 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 10), nn.Linear(10, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Regression(nn.Module):
    """Predicts one number per item; the items of a sample are those that its mask keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, 1)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(torch.randn(param.shape, generator=generator) / 2)

    def tp_plan(self) -> dict[str, Any]:
        return {"inner.*.up": ColwiseParallel(), "inner.*.down": RowwiseParallel()}

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        x = batch["x"].to(self.head.weight.dtype)
        for block in self.inner:
            x = block(x)
        return self.head(x).squeeze(-1).float()

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | int]:
        errors = (self(batch) - batch["y"]) ** 2
        return (errors * batch["mask"]).sum(), batch["mask"].sum()


@dataclass(frozen=True)
class Fields:
    micro_batches: list[dict[str, Tensor]]
    num_samples: int


def global_batch(step: int) -> dict[str, Tensor]:
    """Samples with 0 to 4 items each, so that ranks and micro-batches differ in their items."""
    generator = torch.Generator().manual_seed(100 + step)
    items = torch.randint(5, (GLOBAL_BATCH,), generator=generator)
    return {
        "x": torch.randn(GLOBAL_BATCH, 4, WIDTH, generator=generator),
        "y": torch.randn(GLOBAL_BATCH, 4, generator=generator),
        "mask": torch.arange(4) < items[:, None],
    }


def batch_of_rank(step: int, accumulation: int, ranks: int, rank: int) -> Fields:
    mine = {name: value.chunk(ranks)[rank] for name, value in global_batch(step).items()}
    parts = [
        {name: value.chunk(accumulation)[i] for name, value in mine.items()} for i in range(accumulation)
    ]
    return Fields(parts, GLOBAL_BATCH)


def sharded(
    model: nn.Module, *, replicate: int = 1, tp: int = 1, **train: Any
) -> tuple[LossStep, torch.optim.Optimizer]:
    """The step of ``model`` with its constructor's weights, sharded over all ranks, and the optimizer."""
    values = {name: param.detach().clone() for name, param in model.named_parameters()}
    shard = dist.get_world_size() // replicate // tp
    parallelize(
        model.to("meta"),
        build_mesh("cpu", dp_replicate=replicate, dp_shard=shard, tp=tp),
        train_config(**train),
    )
    materialize(model, CPU, buffers={})
    for name, param in model.named_parameters():
        box = local_box(param)
        own = tuple(slice(start, start + length) for start, length in zip(box.start, box.shape, strict=True))
        with torch.no_grad():
            (param.to_local() if isinstance(param, DTensor) else param).copy_(values[name][own])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    world = dist.group.WORLD
    assert world is not None
    return LossStep(model, optimizer, device=CPU, group=world, grad_clip_norm=1.0, loss_copies=tp), optimizer


def _train(
    accumulation: int, replicate: int, tp: int, options: dict[str, Any]
) -> tuple[list[UpdateResult], dict[str, Tensor], float]:
    """The results of all steps, the whole weights after them, and the validation loss."""
    model = Regression()
    step, _ = sharded(model, replicate=replicate, tp=tp, **options)
    ranks, rank = dist.get_world_size() // tp, dist.get_rank() // tp
    results = []
    for i in range(STEPS):
        loss = step.forward_backward(batch_of_rank(i, accumulation, ranks, rank))
        results.append(step.update(lr=0.1))
        assert loss.item() == pytest.approx(results[-1].loss, rel=1e-6)
    measured = step.evaluate([batch_of_rank(i, accumulation, ranks, rank) for i in (7, 8)])
    assert step.num_evaluated == sum(int(global_batch(i)["mask"].sum()) for i in (7, 8))
    return results, {name: whole(param) for name, param in model.named_parameters()}, measured


def reference() -> tuple[list[tuple[float, float, int]], dict[str, Tensor], float]:
    """The same training in plain torch on whole batches: (loss, gradient norm, items) of every step, ..."""
    model = Regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rows = []
    for i in range(STEPS):
        summed, items = model.loss(global_batch(i))
        (summed / items).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rows.append(((summed / items).item(), norm.item(), int(items)))
    with torch.no_grad():
        totals = [model.loss(global_batch(i)) for i in (7, 8)]
    measured = sum(loss.item() for loss, _ in totals) / sum(int(items) for _, items in totals)
    return rows, {name: param.detach() for name, param in model.named_parameters()}, measured


def check(found: tuple[list[UpdateResult], dict[str, Tensor], float], rtol: float = 1e-6) -> None:
    results, weights, measured = found
    rows, expected, expected_loss = reference()
    assert [row[1] > 1.0 for row in rows].count(True) > 0  # clipping is at work
    assert [result.num_items for result in results] == [row[2] for row in rows]
    got = torch.tensor([(result.loss, result.grad_norm) for result in results], dtype=torch.float64)
    torch.testing.assert_close(
        got, torch.tensor([row[:2] for row in rows], dtype=torch.float64), rtol=rtol, atol=0
    )
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=10 * rtol, atol=rtol)
    assert measured == pytest.approx(expected_loss, rel=10 * rtol)


@pytest.mark.smoke
def test_loss_step_on_two_ranks_equals_plain_torch() -> None:
    for found in run_ranks(_train, 2, 2, 1, 1, {"activation_checkpointing": "full"}):
        check(found)


@pytest.mark.parametrize(
    ("ranks", "accumulation", "replicate", "tp"),
    [(1, 1, 1, 1), (1, 2, 1, 1), (2, 1, 1, 1), (2, 2, 2, 1), (4, 2, 2, 1), (2, 1, 1, 2), (4, 2, 1, 2)],
)
def test_loss_step_layouts_equal_plain_torch(ranks: int, accumulation: int, replicate: int, tp: int) -> None:
    for found in run_ranks(_train, ranks, accumulation, replicate, tp, {}):
        check(found)


def test_loss_step_bf16_is_near_fp32_and_keeps_targets() -> None:
    for found in run_ranks(_train, 2, 2, 1, 1, {"mixed_precision": "bf16"}):
        check(found, rtol=0.05)
        assert found[0][0].loss != reference()[0][0][0]


class TargetDtypes(Regression):
    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        assert {name: value.dtype for name, value in batch.items()} == {
            "x": torch.float32,
            "y": torch.float32,
            "mask": torch.bool,
        }
        return self(batch).sum(), 1


def _bad_batches() -> list[tuple[UpdateResult, bool]]:
    """A batch without items, and one with a loss that is not finite: (result, weights are unchanged)."""
    model = Regression()
    step, _ = sharded(model)
    found = []
    for bad in ("mask", "y"):
        before = {name: whole(param) for name, param in model.named_parameters()}
        batch = batch_of_rank(0, 2, dist.get_world_size(), dist.get_rank())
        for fields in batch.micro_batches:
            fields["mask"] = torch.zeros_like(fields["mask"]) if bad == "mask" else fields["mask"]
            fields["y"] = fields["y"] * math.inf if bad == "y" else fields["y"]
        step.forward_backward(batch)
        result = step.update(lr=0.1)
        same = all(torch.equal(whole(param), before[name]) for name, param in model.named_parameters())
        found.append((result, same))
    assert math.isfinite(step.evaluate([batch_of_rank(0, 1, 1, 0)]))
    step.forward_backward(batch_of_rank(0, 2, dist.get_world_size(), dist.get_rank()))
    assert not step.update(lr=0.1).skipped
    return found


@pytest.mark.smoke
def test_loss_step_batch_without_items_is_skipped() -> None:
    for found in run_ranks(_bad_batches, 2):
        assert [(result.skipped, same) for result, same in found] == [(True, True), (True, True)]
        assert found[0][0].num_items == 0


def _dtypes() -> None:
    step, _ = sharded(TargetDtypes(), mixed_precision="bf16")
    step.forward_backward(batch_of_rank(0, 1, 1, 0))


class OverTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 11)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits = self.table(batch["tokens"])
        loss = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="sum")
        return loss, batch["targets"].ne(IGNORED).sum()


def _tokens(num_ignored: int) -> tuple[float, float, int | None]:
    torch.manual_seed(0)
    model = OverTokens()
    rows = torch.randint(11, (2, 3, 6))
    targets = rows[..., 1:].clone()
    targets[1, :, :num_ignored] = IGNORED
    expected = F.cross_entropy(model.table(rows[..., :-1]).flatten(0, 2), targets.flatten()).item()
    step, _ = sharded(model)

    @dataclass(frozen=True)
    class TokenBatch(FakeBatch):
        num_samples: int = 6

    step.forward_backward(TokenBatch(rows[..., :-1], targets, None if num_ignored else 30))
    result = step.update(lr=0.1)
    return result.loss, expected, result.num_items


class OverDocuments(OverTokens):
    """Counts the tokens of every document but the first of a row."""

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        loss, _ = super().loss(batch)
        return loss, batch["document_ids"].gt(0).sum()


def _documents() -> int | None:
    rows, ids = torch.randint(11, (2, 3, 6)), torch.tensor([0, 0, 1, 1, 2]).expand(2, 3, 5)
    step, _ = sharded(OverDocuments())

    @dataclass(frozen=True)
    class TokenBatch(FakeBatch):
        num_samples: int = 6

    step.forward_backward(TokenBatch(rows[..., :-1], rows[..., 1:], 30, ids))
    return step.update(lr=0.1).num_items


def test_loss_step_on_masked_data_gets_document_ids() -> None:
    assert run_ranks(_documents, 1) == [6 * 3]


def test_loss_step_on_token_data_gets_tokens_and_targets() -> None:
    run_ranks(_dtypes, 1)
    for num_ignored in (0, 4):
        [(loss, expected, num_items)] = run_ranks(_tokens, 1, num_ignored)
        assert loss == pytest.approx(expected, rel=1e-6)
        assert num_items == 30 - 3 * num_ignored


class Unusable(Regression):
    def __init__(self, result: Any) -> None:
        super().__init__()
        self.result = result

    def loss(self, batch: dict[str, Tensor]) -> Any:
        summed, items = super().loss(batch)
        return {"alone": summed, "vector": (summed[None], items), "float": (summed, 3.0)}.get(
            self.result, (summed.detach(), items)
        )


def _unusable(result: str) -> None:
    step, _ = sharded(Unusable(result))
    step.forward_backward(batch_of_rank(0, 1, 1, 0))


@pytest.mark.parametrize(
    ("result", "problem"),
    [
        ("alone", "Unusable.loss(batch) returned a Tensor; it returns the summed loss"),
        ("vector", "returned a tensor [1] as the loss"),
        ("float", "returned a float as the number of items"),
        ("detached", "returned a loss that does not depend on the parameters"),
    ],
)
def test_loss_of_unusable_kind_is_named(result: str, problem: str) -> None:
    with pytest.raises(RanksFailed) as error:
        run_ranks(_unusable, 1, result)
    assert "PluginError: Unusable.loss(batch) returned " in str(error.value)
    assert problem in str(error.value)
