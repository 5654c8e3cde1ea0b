"""The step: the same mathematics however it is spread, the same bits when repeated, safe when not finite."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import xxhash
from support.ranks import run_ranks
from support.tiny_model import (
    CPU,
    MODEL,
    adamw,
    batch_of_rank,
    global_batch,
    local_step,
    sharded_model,
    train_config,
    whole,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kempnerforge.model.init import init_weights_
from kempnerforge.model.llama import Llama
from kempnerforge.train.step import LocalStep, UpdateResult, global_norm

STEPS = 4


def _train(
    accumulation: int,
    replicate: int = 1,
    precision: str = "fp32",
    grad_clip_norm: float = 1.0,
) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """(loss, grad norm) of every step, and the whole weights after the last."""
    model = sharded_model(train_config(mixed_precision=precision), replicate=replicate)
    step = local_step(model, grad_clip_norm=grad_clip_norm)
    rows = []
    for i in range(STEPS):
        loss = step.forward_backward(batch_of_rank(i, accumulation))
        result = step.update(lr=0.01 / (i + 1))
        assert not result.skipped
        assert result.loss == loss.item()
        rows.append((result.loss, result.grad_norm))
    return rows, {name: whole(param) for name, param in model.named_parameters()}


def reference(grad_clip_norm: float = 1.0) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """The same training in plain torch: one process, one batch, nothing sharded, torch's own clipping."""
    with torch.device("meta"):
        model = Llama(MODEL)
    model.to_empty(device="cpu")
    init_weights_(model, seed=7, init_std=MODEL.init_std, n_layers=MODEL.n_layers)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1, eps=1e-8)
    rows = []
    for i in range(STEPS):
        batch = global_batch(i)
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip_norm or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (i + 1)
        optimizer.step()
        optimizer.zero_grad()
        rows.append((loss.item(), norm.item()))
    return rows, {name: param.detach() for name, param in model.named_parameters()}


@pytest.mark.parametrize(
    ("ranks", "accumulation", "replicate"),
    [(1, 1, 1), (1, 4, 1), (2, 2, 1), (4, 1, 1), (2, 2, 2), (4, 2, 2)],
    ids=lambda value: str(value),
)
def test_step_layouts_and_accumulation_match_plain_torch(
    ranks: int, accumulation: int, replicate: int
) -> None:
    expected_rows, expected_weights = reference()
    assert max(norm for _, norm in expected_rows) > 1.0  # clipping is at work
    for rows, weights in run_ranks(_train, ranks, accumulation, replicate):
        torch.testing.assert_close(torch.tensor(rows), torch.tensor(expected_rows), rtol=2e-5, atol=0)
        assert weights.keys() == expected_weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected_weights[name], rtol=1e-3, atol=2e-5)


@pytest.mark.smoke
def test_step_clipping_off_matches_plain_torch() -> None:
    expected_rows, _ = reference(grad_clip_norm=0.0)
    [(rows, _)] = run_ranks(_train, 1, 1, 1, "fp32", 0.0)
    torch.testing.assert_close(torch.tensor(rows), torch.tensor(expected_rows), rtol=2e-5, atol=0)


@pytest.mark.parametrize(("precision", "replicate"), [("fp32", 1), ("bf16", 1), ("fp32", 2)])
def test_step_identical_runs_have_same_bits(precision: str, replicate: int) -> None:
    first = run_ranks(_train, 2, 2, replicate, precision)
    again = run_ranks(_train, 2, 2, replicate, precision)
    for (rows, weights), (rows_again, weights_again) in zip(first, again, strict=True):
        assert rows == rows_again == first[0][0]
        assert all(torch.equal(weights[name], weights_again[name]) for name in weights)


def test_step_bf16_near_fp32_and_keeps_fp32_weights() -> None:
    [(rows, weights)] = run_ranks(_train, 1, 2, 1, "bf16")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    torch.testing.assert_close(torch.tensor(rows), torch.tensor(reference()[0]), rtol=0.05, atol=0)
    assert rows != reference()[0]


def _digest(model: Llama, optimizer: torch.optim.Optimizer) -> str:
    """Of this rank's part of all weights and of all optimizer state."""
    hasher = xxhash.xxh3_64()
    for param in model.parameters():
        for tensor in (param, *optimizer.state[param].values()):
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            hasher.update(local.detach().contiguous().numpy().tobytes())
    return hasher.hexdigest()


def _train_around_a_bad_step(bad: str | None) -> tuple[list[UpdateResult], list[UpdateResult], str]:
    """Two good steps with a bad one between them; a rank other than 0 is the only one that sees the cause."""
    model = sharded_model()
    optimizer = adamw(model)
    step = local_step(model, optimizer=optimizer)
    results, skipped = [], []
    for i in range(2):
        step.forward_backward(batch_of_rank(i, 1))
        results.append(step.update(lr=0.01))
        if bad is None:
            continue
        before = _digest(model, optimizer)
        batch = batch_of_rank(9, 1)
        loss = step.forward_backward(batch)
        if bad == "loss":
            loss.fill_(math.nan)
        elif dist.get_rank() == dist.get_world_size() - 1:
            grad = model.layers["1"].get_parameter("attention.wk.weight").grad
            assert isinstance(grad, DTensor)
            grad.to_local()[0, 0] = float(bad)
        skipped.append(step.update(lr=0.01))
        assert _digest(model, optimizer) == before
        assert all(param.grad is None for param in model.parameters())
    return results, skipped, _digest(model, optimizer)


@pytest.mark.smoke
@pytest.mark.parametrize("bad", ["nan", "inf", "loss"])
def test_step_not_finite_is_skipped_without_trace(bad: str) -> None:
    undisturbed = run_ranks(_train_around_a_bad_step, 2, None)
    for (results, skipped, digest), (expected, _, expected_digest) in zip(
        run_ranks(_train_around_a_bad_step, 2, bad), undisturbed, strict=True
    ):
        assert [result.skipped for result in skipped] == [True, True]
        assert not math.isfinite(skipped[0].grad_norm if bad != "loss" else skipped[0].loss)
        assert (results, digest) == (expected, expected_digest)


def _overflow() -> list[UpdateResult]:
    """One rank has weights that overflow in the forward pass: nothing is planted in loss or gradients."""
    model = sharded_model()
    if dist.get_rank() == 1:
        weight = model.layers["0"].get_parameter("feed_forward.w1.weight")
        assert isinstance(weight, DTensor)
        weight.to_local().detach().fill_(3e38)
    step = local_step(model)
    step.forward_backward(batch_of_rank(0, 1))
    return [step.update(lr=0.01)]


@pytest.mark.smoke
def test_step_forward_overflow_is_skipped() -> None:
    for [result] in run_ranks(_overflow, 2):
        assert result.skipped


def _evaluate(precision: str) -> tuple[float, float, bool, bool]:
    model = sharded_model(train_config(mixed_precision=precision))
    step = local_step(model)
    before = torch.get_rng_state()
    batches = [batch_of_rank(0, 2), batch_of_rank(1, 1)]
    measured = step.evaluate(iter(batches))
    untouched = torch.equal(torch.get_rng_state(), before) and all(
        isinstance(param, DTensor) and param.grad is None for param in model.parameters()
    )
    losses = [step.forward_backward(batch).item() for batch in batches]
    return measured, sum(losses) / 2, untouched, model.training


@pytest.mark.smoke
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluate_is_mean_training_loss_over_ranks(precision: str) -> None:
    for measured, expected, untouched, training in run_ranks(_evaluate, 2, precision):
        assert measured == pytest.approx(expected, rel=1e-6)
        assert untouched
        assert training


def _train_with_evaluations(every_step: bool) -> tuple[list[UpdateResult], str]:
    model = sharded_model()
    optimizer = adamw(model)
    step = local_step(model, optimizer=optimizer)
    results = []
    for i in range(STEPS):
        step.forward_backward(batch_of_rank(i, 2))
        results.append(step.update(lr=0.01))
        if every_step:
            step.evaluate([batch_of_rank(50 + i, 1)])
    return results, _digest(model, optimizer)


def test_evaluate_every_step_does_not_change_training() -> None:
    assert run_ranks(_train_with_evaluations, 2, True) == run_ranks(_train_with_evaluations, 2, False)


def _misuse() -> None:
    model = sharded_model()
    step = local_step(model)
    with pytest.raises(RuntimeError, match=r"update\(\) without a forward_backward"):
        step.update(lr=0.01)
    assert math.isnan(step.evaluate([]))
    world = dist.group.WORLD
    assert world is not None
    with pytest.raises(TypeError, match="that parallelize"):
        LocalStep(nn.Linear(1, 1), adamw(model), device=CPU, group=world, grad_clip_norm=1.0)


@pytest.mark.smoke
def test_step_misuse_is_reported() -> None:
    run_ranks(_misuse, 1)


def _norms(replicate: int) -> tuple[float, float]:
    model = sharded_model(replicate=replicate)
    world = dist.group.WORLD
    assert world is not None
    measured = global_norm(model.parameters(), group=world, device=CPU).item()
    return measured, torch.cat([whole(p).flatten().double() for p in model.parameters()]).norm().item()


@pytest.mark.parametrize(("ranks", "replicate"), [(1, 1), (3, 1), (4, 2), (3, 3)])
def test_global_norm_counts_every_element_once(ranks: int, replicate: int) -> None:
    results = run_ranks(_norms, ranks, replicate)
    assert len(set(results)) == 1
    assert results[0][0] == pytest.approx(results[0][1], rel=1e-6)
