"""Tensor parallelism: what each rank holds, and the same mathematics, also tied and uneven."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from support.tiny_model import (
    TP_MODEL,
    FakeBatch,
    global_batch,
    local_step,
    sharded_model,
    train_config,
    whole,
)
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard


def _train(tied: bool, tp: int, options: dict[str, str]) -> tuple[list[tuple[float, ...]], dict[str, Tensor]]:
    """(loss, norm) of every step, the validation loss, and the whole weights after."""
    config = TP_MODEL.model_copy(update={"tie_embeddings": tied})
    model = sharded_model(train_config(**options), tp=tp, config=config)
    step = local_step(model, tp=tp)
    dp = dist.get_world_size() // tp
    rows: list[tuple[float, ...]] = []
    batches: list[FakeBatch] = []
    for i in range(4):
        mine_ABT = global_batch(i).chunk(dp)[dist.get_rank() // tp].unflatten(0, (2, -1))
        batches.append(FakeBatch(mine_ABT[..., :-1], mine_ABT[..., 1:], global_batch(i)[:, 1:].numel()))
        step.forward_backward(batches[-1])
        result = step.update(lr=0.01)
        rows.append((result.loss, result.grad_norm))
    rows.append((step.evaluate(batches[-1:]),) * 2)
    return rows, {name: whole(param) for name, param in model.named_parameters()}


@pytest.mark.parametrize(
    ("ranks", "tied"), [pytest.param(2, False, marks=pytest.mark.smoke), (2, True), (4, True)]
)
def test_tensor_parallel_ranks_train_as_one(ranks: int, tied: bool) -> None:
    [(rows, weights)] = run_ranks(_train, 1, tied, 1, {})
    found = run_ranks(_train, ranks, tied, 2, {})
    assert all(one[0] == found[0][0] for one in found), "not the same bits on every rank"
    torch.testing.assert_close(torch.tensor(found[0][0][:4]), torch.tensor(rows[:4]), rtol=2e-5, atol=0)
    if ranks == 2:
        assert found[0][0][4] == pytest.approx(rows[4], rel=2e-5)
    for name, weight in found[0][1].items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("remat", ["selective", "full"])
def test_tensor_parallel_recomputation_changes_no_bit(remat: str) -> None:
    expected = run_ranks(_train, 2, False, 2, {"mixed_precision": "bf16"})
    found = run_ranks(_train, 2, False, 2, {"mixed_precision": "bf16", "activation_checkpointing": remat})
    assert [rows for rows, _ in found] == [rows for rows, _ in expected]


def _placements() -> dict[str, tuple[str, int]]:
    model = sharded_model(tp=2, config=TP_MODEL)
    logits = model(torch.zeros(1, 8, dtype=torch.int64))
    assert isinstance(logits, DTensor)
    assert logits.placements == (Shard(2),)
    assert logits.shape == (1, 8, 67)
    found = {}
    for name, param in model.named_parameters():
        assert isinstance(param, DTensor)
        cut = param.placements[-1]
        found[name] = ("copy" if isinstance(cut, Replicate) else f"dim {cut.dim}", param.to_local().numel())  # type: ignore[attr-defined]
    return found


@pytest.mark.smoke
def test_tensor_parallel_matrices_cut_norms_copied() -> None:
    found = run_ranks(_placements, 2)
    block = "layers.0."
    for name in ("attention.wq", "attention.wk", "attention.wv", "feed_forward.w1", "feed_forward.w3"):
        assert found[0][f"{block}{name}.weight"][0] == "dim 0"
    for name in ("attention.wo", "feed_forward.w2"):
        assert found[0][f"{block}{name}.weight"][0] == "dim 1"
    for name in ("attention_norm", "ffn_norm"):
        assert found[0][f"{block}{name}.weight"] == ("copy", 24)
    for name in ("tok_embeddings.weight", "output.weight"):
        assert [one[name] for one in found] == [("dim 0", 34 * 24), ("dim 0", 33 * 24)]
