"""Sharding keeps names, sums gradients exactly, and composes with recomputation, compilation and bf16."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.ranks import run_ranks
from support.tiny_model import MODEL, batch_of_rank, local_step, losses_of, sharded_model, train_config, whole
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from kempnerforge.config.schema import ModelConfig
from kempnerforge.model.init import init_weights_
from kempnerforge.model.llama import Llama

TIED = MODEL.model_copy(update={"tie_embeddings": True})


def plain_model(config: ModelConfig = MODEL) -> Llama:
    with torch.device("meta"):
        model = Llama(config)
    model.to_empty(device="cpu")
    init_weights_(model, seed=7, init_std=config.init_std, n_layers=config.n_layers)
    return model


def _parameters(config: ModelConfig, options: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    model = sharded_model(train_config(**options), config=config)
    units = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    assert units == ["", "layers.0", "layers.1"]
    seen = {}
    for name, param in model.named_parameters():
        assert isinstance(param, DTensor)
        seen[name] = (param.dtype, whole(param))
    assert list(model.state_dict()) == list(seen)
    return seen


@pytest.mark.parametrize("tied", [False, True])
def test_shard_keeps_names_types_and_values(tied: bool) -> None:
    options = {"activation_checkpointing": "full", "compile_model": not tied, "mixed_precision": "bf16"}
    config = TIED if tied else MODEL
    expected = dict(plain_model(config).named_parameters())
    for seen in run_ranks(_parameters, 2, config, options):
        assert list(seen) == list(expected)
        for name, (dtype, values) in seen.items():
            assert dtype == torch.float32
            assert torch.equal(values, expected[name])


def _summed_and_single_gradients(replicate: int, tied: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """FSDP's gradients, and this rank's own from a plain model on the same micro-batch."""
    config = TIED if tied else MODEL
    model, plain = sharded_model(replicate=replicate, config=config), plain_model(config)
    batch = batch_of_rank(0, 1)
    local_step(model).forward_backward(batch)
    logits = plain(batch.inputs_ABT[0])
    loss = F.cross_entropy(logits.flatten(0, 1), batch.targets_ABT[0].flatten(), reduction="sum")
    assert batch.num_tokens is not None
    (loss / batch.num_tokens).backward()
    return _gradients(model), _gradients(plain)


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.smoke
@pytest.mark.parametrize(("ranks", "replicate"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("tied", [False, True])
def test_shard_gradients_are_exact_sum_over_ranks(ranks: int, replicate: int, tied: bool) -> None:
    """Two addends have one sum, so it can be compared bit for bit: no averaging, no scaling, no loss."""
    results = run_ranks(_summed_and_single_gradients, ranks, replicate, tied)
    for name in results[0][1]:
        expected = functools.reduce(torch.add, (single[name] for _, single in results))
        for summed, _ in results:
            assert torch.equal(summed[name], expected), name


@pytest.mark.parametrize("remat", ["selective", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_shard_recomputation_changes_no_bit(remat: str, precision: str) -> None:
    options = {"mixed_precision": precision}
    expected = run_ranks(losses_of, 2, options)
    assert run_ranks(losses_of, 2, options | {"activation_checkpointing": remat}) == expected


def _types() -> dict[str, tuple[torch.dtype, ...]]:
    """Types that modules see in a bf16 forward pass."""
    model = sharded_model(train_config(mixed_precision="bf16"))
    seen: dict[str, tuple[torch.dtype, ...]] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            weights = [p.dtype for p in module.parameters(recurse=False)]
            seen[name] = (*(arg.dtype for arg in args), *weights, output.dtype)

        return hook

    for name in ("", "layers.0.attention", "layers.0.attention_norm", "layers.1.feed_forward.w2"):
        model.get_submodule(name).register_forward_hook(record(name))
    local_step(model).forward_backward(batch_of_rank(0, 1))
    gradients = {p.grad.dtype for p in model.parameters() if p.grad is not None}
    assert gradients == {torch.float32}
    assert dist.get_world_size() == 1
    return seen


@pytest.mark.smoke
def test_shard_bf16_reaches_layers_not_rotary_tables() -> None:
    fp32, bf16 = torch.float32, torch.bfloat16
    [seen] = run_ranks(_types, 1)
    assert seen[""] == (torch.int64, bf16)
    assert seen["layers.0.attention"] == (bf16, fp32, fp32, bf16)
    assert seen["layers.0.attention_norm"] == (bf16, bf16, bf16)
    assert seen["layers.1.feed_forward.w2"] == (bf16, bf16, bf16)
