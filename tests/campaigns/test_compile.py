"""Compiled blocks train as eager ones do."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from support.documents import Found, assert_as_alone, document_ids, one_step
from support.ranks import run_ranks
from support.step_memory import block_and_input, kept_by_autograd
from support.tiny_model import (
    MODEL,
    TP_MODEL,
    FakeBatch,
    global_batch,
    local_step,
    losses_of,
    sharded_model,
    train_config,
    whole,
)
from torch import Tensor
from torch.nn.attention import flex_attention

from kempnerforge.config.schema import ModelConfig
from kempnerforge.model import document_attention, llama
from kempnerforge.model.init import init_weights_
from kempnerforge.model.llama import Llama
from kempnerforge.model.recompute import Recompute, recompute_activations
from kempnerforge.plan import activations

TO_COMPILE = MODEL.model_copy(update={"n_heads": 6, "n_kv_heads": 2, "head_dim": 6})
"""torch 2.13 compiles a single pair of rotary channels (one key head of width 2) into wrong gradients."""
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


def _compiled_losses(options: dict[str, Any]) -> tuple[list[tuple[float, float]], int, int]:
    from torch._dynamo.utils import counters

    rows = losses_of(options | {"compile_model": True}, TO_COMPILE)
    return rows, counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


@pytest.mark.parametrize(("precision", "remat"), [("fp32", "none"), ("fp32", "full"), ("bf16", "selective")])
def test_shard_compiled_blocks_train_as_eager(precision: str, remat: str) -> None:
    options = {"mixed_precision": precision, "activation_checkpointing": remat}
    tolerance = 1e-4 if precision == "fp32" else 0.03
    expected = torch.tensor(run_ranks(losses_of, 2, options, TO_COMPILE)[0])
    for rows, graphs, graph_breaks in run_ranks(_compiled_losses, 2, options, timeout_s=250):
        torch.testing.assert_close(torch.tensor(rows), expected, rtol=tolerance, atol=0)
        # All layers share one graph for training and one for evaluation.
        assert (graphs, graph_breaks) == (2, 0)


def _gradients(compile_model: bool) -> dict[str, Tensor]:
    model = sharded_model(train_config(compile_model=compile_model), tp=2, config=TP_MODEL)
    tokens_BT = global_batch(0)
    batch = FakeBatch(tokens_BT[None, :, :-1], tokens_BT[None, :, 1:], tokens_BT[:, 1:].numel())
    local_step(model, tp=2).forward_backward(batch)
    return {name: whole(param.grad) for name, param in model.named_parameters() if param.grad is not None}


def test_tensor_parallel_compiled_gradients_match() -> None:
    """The embedding's too, which torch 2.13 loses when a compiled block gets a collective that still runs."""
    expected, *_ = run_ranks(_gradients, 2, False)
    for found in run_ranks(_gradients, 2, True, timeout_s=400):
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            assert (gradient - expected[name]).norm() < 1e-5 * expected[name].norm(), name


def _kept_and_planned(remat: str) -> tuple[int, float]:
    """Bytes that a compiled block keeps for its backward pass of 64 tokens."""
    config = ModelConfig(
        dim=64, n_layers=1, n_heads=8, n_kv_heads=2, head_dim=16, ffn_hidden_dim=176, max_seq_len=32
    )
    train = train_config(activation_checkpointing=remat, compile_model=True)
    block, inputs = block_and_input(config, train)
    block.compile()
    return kept_by_autograd(block, inputs), 64 * activations.kept_by_layer(config, train, 1)


@pytest.mark.parametrize("remat", ["none", "selective"])
def test_plan_compiled_activations_match_autograd(remat: str) -> None:
    [(kept, planned)] = run_ranks(_kept_and_planned, 1, remat, timeout_s=300.0)
    assert planned == pytest.approx(kept, rel=0.02)


def _compiled_step(distributed: dict[str, Any], train: dict[str, Any]) -> tuple[Found, int, int]:
    from torch._dynamo.utils import counters

    found = one_step(distributed, {**train, "compile_model": True})
    return found, counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


@pytest.mark.parametrize(
    ("distributed", "train"),
    [({}, {"batch_size": 1}), ({"tp": 2}, {"batch_size": 2, "activation_checkpointing": "selective"})],
)
def test_compiled_document_mask_trains_as_documents_alone(
    distributed: dict[str, Any], train: dict[str, Any]
) -> None:
    """Micro-batches of other numbers of documents share their graphs."""
    results = run_ranks(_compiled_step, 2, distributed, train, timeout_s=400)
    for _, graphs, graph_breaks in results:
        assert graph_breaks == 0
        # For training and for evaluation: one for the first number of documents, and one for all others.
        assert graphs <= 4
    assert_as_alone([found for found, _, _ in results], train)


CUTS = [[[100, 1, 99], [200]], [[7, 193], [50, 50, 50, 50]], [[200], [1] * 200]]


def _document_gradients(recompute: Recompute, backend: str | None) -> list[dict[str, Tensor]]:
    """Gradients of rows that are cut into other documents each time."""
    config = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=61, max_seq_len=256)
    model = Llama(config)
    init_weights_(model, seed=3, init_std=0.3, n_layers=2)
    for block in model.fsdp_units():
        recompute_activations(block, recompute)
        if backend:
            block.compile(backend=backend)
    tokens_BT = torch.randint(61, (2, 200), generator=torch.Generator().manual_seed(1))
    found = []
    for cut in CUTS:
        loss = model(tokens_BT, document_ids=document_ids(cut)).square().mean()
        params = dict(model.named_parameters())
        found.append(dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True)))
    return found


@pytest.mark.parametrize("compiles_blocks", [False, True])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_block_mask_trains_as_documents_alone(
    monkeypatch: pytest.MonkeyPatch, recompute: Recompute, compiles_blocks: bool
) -> None:
    """The path of CUDA but for the kernel: torch computes the same on the CPU, if it is not asked first."""
    from torch._dynamo.utils import counters

    expected = _document_gradients("none", None)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(llama, "document_mask", document_attention.block_mask)
    fused = torch.compile(flex_attention.flex_attention, dynamic=False, backend="aot_eager")
    monkeypatch.setattr(document_attention, "_fused_flex", lambda: fused)
    torch._dynamo.reset()
    counters.clear()
    found = _document_gradients(recompute, "aot_eager" if compiles_blocks else None)
    assert counters["stats"]["unique_graphs"] == 1, "other documents are no other graph"
    assert not counters["graph_break"]
    for one, wanted in zip(found, expected, strict=True):
        for name, gradient in one.items():
            assert (gradient - wanted[name]).norm() < 1e-5 * wanted[name].norm(), name
