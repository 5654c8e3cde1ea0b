"""Tensor parallelism: what each rank holds, and the same mathematics, also tied and uneven."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from support.tiny_model import FakeBatch, global_batch, local_step, sharded_model, train_config, whole
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from kempnerforge.config.schema import ModelConfig

CONFIG = ModelConfig(
    dim=24,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    ffn_hidden_dim=50,
    vocab_size=67,
    max_seq_len=16,
    init_std=0.2,
)
"""67 rows are uneven over two ranks, and again over two shards of each."""


def _train(tied: bool, tp: int, options: dict[str, str]) -> tuple[list[tuple[float, ...]], dict[str, Tensor]]:
    """(loss, norm) of every step, the validation loss, and the whole weights after."""
    config = CONFIG.model_copy(update={"tie_embeddings": tied})
    model = sharded_model(train_config(**options), tp=tp, config=config)
    step = local_step(model, tp=tp)
    dp = dist.get_world_size() // tp
    rows: list[tuple[float, ...]] = []
    for i in range(4):
        mine_ABT = global_batch(i).chunk(dp)[dist.get_rank() // tp].unflatten(0, (2, -1))
        batch = FakeBatch(mine_ABT[..., :-1], mine_ABT[..., 1:], global_batch(i)[:, 1:].numel())
        step.forward_backward(batch)
        result = step.update(lr=0.01)
        rows.append((result.loss, result.grad_norm))
    rows.append((step.evaluate([batch]),) * 2)
    return rows, {name: whole(param) for name, param in model.named_parameters()}


@pytest.mark.parametrize(("ranks", "tied"), [(2, False), (2, True), (4, True)])
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
def test_recomputation_changes_no_bit(remat: str) -> None:
    expected = run_ranks(_train, 2, False, 2, {"mixed_precision": "bf16"})
    found = run_ranks(_train, 2, False, 2, {"mixed_precision": "bf16", "activation_checkpointing": remat})
    assert [rows for rows, _ in found] == [rows for rows, _ in expected]


def _gradients(compile_model: bool) -> dict[str, Tensor]:
    model = sharded_model(train_config(compile_model=compile_model), tp=2, config=CONFIG)
    tokens_BT = global_batch(0)
    batch = FakeBatch(tokens_BT[None, :, :-1], tokens_BT[None, :, 1:], tokens_BT[:, 1:].numel())
    local_step(model, tp=2).forward_backward(batch)
    return {name: whole(param.grad) for name, param in model.named_parameters() if param.grad is not None}


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_have_the_same_gradients() -> None:
    """The embedding's too, which torch 2.13 loses when a compiled block gets a collective that still runs."""
    expected, *_ = run_ranks(_gradients, 2, False)
    for found in run_ranks(_gradients, 2, True, timeout_s=400):
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            assert (gradient - expected[name]).norm() < 1e-5 * expected[name].norm(), name


def _placements() -> dict[str, tuple[str, int]]:
    model = sharded_model(tp=2, config=CONFIG)
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


def test_matrices_are_cut_and_norms_are_copied() -> None:
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
