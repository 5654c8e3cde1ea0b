"""The memory that ``kempnerforge plan`` works out, against the live tensors of real steps of every kind."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from support.ranks import run_ranks
from support.step_memory import peak_and_plan

from kempnerforge.plan.memory import DeviceMemory

WITHIN = 1.2
"""Neither may be more than this many times the other."""
DEEP = {"dim": 64, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "ffn_hidden_dim": 176, "vocab_size": 260}
WIDE = {"dim": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "ffn_hidden_dim": 88, "vocab_size": 2048}
"""Logits are most of its memory, as in a small model with a vocabulary of 128,000."""
CHUNKED = {"loss": "chunked_cross_entropy", "loss_args": {"chunk_tokens": 16}}
Tree = dict[str, Any]
Measured = list[tuple[int, str, DeviceMemory]]


def job_tree(model: Tree, distributed: Tree, train: Tree, **others: Any) -> Tree:
    """A job with microbatches of 2 sequences of 64 tokens."""
    if distributed.get("pp", 1) > 1:
        distributed = {"pp_microbatch_size": 2, **distributed}
    return {
        "data": {"text": "python-stdlib"},
        "model": {"max_seq_len": 64, **model},
        "distributed": distributed,
        "train": {"seq_len": 64, "batch_size": 2, **train},
        **others,
    }


def pipelined(schedule: str, pp: int = 2) -> tuple[Tree, Tree]:
    """``[distributed]`` of a schedule, and ``[train]`` with the microbatches that it takes."""
    if schedule == "none":
        return {}, {}
    microbatches = pp if schedule == "interleaved_1f1b" else 2 * pp
    return {"pp": pp, "pp_schedule": schedule}, {"batch_size": 2 * microbatches}


def measure_all(trees: list[Tree]) -> Measured:
    return [peak_and_plan(tree) for tree in trees]


def assert_plan_right(trees: list[Tree], ranks: int) -> None:
    for rank, measured in enumerate(run_ranks(measure_all, ranks, trees)):
        for tree, (peak, after, planned) in zip(trees, measured, strict=True):
            what = f"rank {rank}, {tree['train']}: {peak:,} bytes after {after}, planned {planned}"
            assert peak / WITHIN <= planned.total <= peak * WITHIN, what


@pytest.mark.parametrize("model", [DEEP, WIDE], ids=["deep", "wide"])
@pytest.mark.parametrize("schedule", ["none", "1f1b", "gpipe", "interleaved_1f1b"])
def test_plan_memory_schedules_match_live_tensors(schedule: str, model: Tree) -> None:
    """Each in both precisions and with every kind of recomputation."""
    distributed, train = pipelined(schedule)
    trees = [
        job_tree(
            model, distributed, {**train, "mixed_precision": precision, "activation_checkpointing": kept}
        )
        for precision, kept in itertools.product(["fp32", "bf16"], ["none", "selective", "full"])
    ]
    assert_plan_right(trees, distributed.get("pp", 1))


@pytest.mark.smoke
def test_plan_memory_gpipe_large_vocabulary_matches() -> None:
    """The logits and log-probabilities of all microbatches are most of it."""
    distributed, train = pipelined("gpipe")
    tree = job_tree(WIDE | {"n_layers": 2}, distributed, train)
    assert_plan_right([tree], 2)


@pytest.mark.parametrize(
    ("ranks", "distributed", "train"),
    [
        pytest.param(2, {}, {}, id="shards"),
        pytest.param(2, {}, {"global_batch_size": 8}, id="accumulation"),
        pytest.param(2, {"tp": 2}, {}, id="tp"),
        pytest.param(2, {"tp": 2}, CHUNKED, id="tp-chunked"),
        pytest.param(4, {"dp_replicate": 2}, {}, id="replicas"),
        pytest.param(4, *pipelined("1f1b"), id="sharded-1f1b"),
        pytest.param(4, {"tp": 2, **pipelined("gpipe")[0]}, pipelined("gpipe")[1], id="tp-gpipe"),
        pytest.param(4, *pipelined("1f1b", pp=4), id="four-stages"),
    ],
)
def test_plan_memory_layouts_match_live_tensors(ranks: int, distributed: Tree, train: Tree) -> None:
    trees = [
        job_tree(model, distributed, {**train, "mixed_precision": precision})
        for model, precision in itertools.product([DEEP, WIDE], ["fp32", "bf16"])
    ]
    assert_plan_right(trees, ranks)


@pytest.mark.parametrize("schedule", ["none", "1f1b"])
@pytest.mark.parametrize("freeze", [["feed_forward", "attention.w"], ["tok_embeddings", "layers"]], ids=str)
def test_plan_memory_frozen_is_enough(schedule: str, freeze: list[str]) -> None:
    """Weights, gradients and state are exact. Activations are counted as if all parameters were trained."""
    distributed, train = pipelined(schedule)
    trees = [
        job_tree({**model, "freeze": freeze}, distributed, {**train, "mixed_precision": precision})
        for model, precision in itertools.product([DEEP, WIDE], ["fp32", "bf16"])
    ]
    for measured in run_ranks(measure_all, distributed.get("pp", 1), trees):
        for peak, after, planned in measured:
            assert peak <= planned.total * WITHIN, f"{peak:,} bytes after {after}, planned {planned}"


@pytest.mark.parametrize("schedule", ["none", "1f1b", "gpipe", "interleaved_1f1b"])
def test_plan_memory_losses_match_live_tensors(schedule: str) -> None:
    """The chunked loss with several chunks, and the plain one with a z-loss, in both precisions."""
    distributed, train = pipelined(schedule)
    trees = [
        job_tree(model, distributed, {**train, **loss, "mixed_precision": precision})
        for model, precision, loss in itertools.product(
            [DEEP, WIDE], ["fp32", "bf16"], [CHUNKED, {"z_loss": 0.1}]
        )
    ]
    assert_plan_right(trees, distributed.get("pp", 1))


def test_plan_memory_validation_counts_second_schedule() -> None:
    """Of many microbatches: its receive buffers and what it hands on are more than gradients."""
    model = DEEP | {"dim": 16, "ffn_hidden_dim": 16, "n_heads": 2, "n_layers": 3}
    train = {"batch_size": 24, "mixed_precision": "fp32", "activation_checkpointing": "full"}
    trees = [
        job_tree(model, {"pp": 3, "pp_microbatch_size": 1}, train, eval={"interval": interval})
        for interval in (0, 1)
    ]
    assert_plan_right(trees, 3)
