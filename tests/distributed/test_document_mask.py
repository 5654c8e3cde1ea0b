"""Rows of several documents in every layout, against a plain model that gets each document alone."""

from __future__ import annotations

from typing import Any

import pytest
from support.documents import assert_as_alone, one_step
from support.ranks import run_ranks

CHUNKED = {"loss": "chunked_cross_entropy", "loss_args": {"chunk_tokens": 5}}
Tree = dict[str, Any]


@pytest.mark.parametrize(
    ("ranks", "distributed", "train"),
    [
        pytest.param(1, {}, {"batch_size": 8}, id="one"),
        pytest.param(2, {}, {"batch_size": 2}, id="fsdp-accumulation", marks=pytest.mark.smoke),
        pytest.param(2, {}, {"batch_size": 4, "activation_checkpointing": "full", **CHUNKED}, id="fsdp-full"),
        pytest.param(4, {"dp_replicate": 2}, {"batch_size": 1}, id="replicas"),
        pytest.param(2, {"tp": 2}, {"batch_size": 4}, id="tp"),
        pytest.param(
            2,
            {"tp": 2},
            {"batch_size": 4, "activation_checkpointing": "selective", **CHUNKED},
            id="tp-selective",
        ),
        pytest.param(2, {"pp": 2}, {"batch_size": 8}, id="1f1b"),
        pytest.param(
            2,
            {"pp": 2, "pp_schedule": "gpipe", "pp_microbatch_size": 2},
            {"batch_size": 8, "activation_checkpointing": "full", **CHUNKED},
            id="gpipe-full",
        ),
        pytest.param(2, {"pp": 2, "pp_schedule": "interleaved_1f1b"}, {"batch_size": 8}, id="interleaved"),
        pytest.param(4, {"pp": 2, "tp": 2}, {"batch_size": 8}, id="pp-tp"),
        pytest.param(4, {"pp": 2}, {"batch_size": 4}, id="pp-dp"),
    ],
)
def test_masked_layout_trains_as_documents_alone(ranks: int, distributed: Tree, train: Tree) -> None:
    assert_as_alone(run_ranks(one_step, ranks, distributed, train), train)
