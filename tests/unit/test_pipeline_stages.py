"""Sharing layers out to pipeline stages."""

from __future__ import annotations

import itertools

import pytest

from kempnerforge.config.pipeline_stages import layer_costs, make_stages, split_evenly, stages_of
from kempnerforge.config.schema import DistributedConfig, ModelConfig


@pytest.mark.parametrize(
    ("embedding", "head", "n_layers", "parts", "sizes"),
    [
        (0.0, 0.0, 8, 1, [8]),
        (0.0, 0.0, 8, 4, [2, 2, 2, 2]),
        (1.0, 1.0, 8, 4, [1, 2, 2, 3]),
        (1.0, 1.0, 6, 4, [1, 2, 2, 1]),
        (0.1, 0.1, 9, 4, [2, 3, 2, 2]),
        (3.0, 3.0, 10, 4, [1, 4, 4, 1]),
        (0.0, 9.0, 4, 4, [1, 1, 1, 1]),
    ],
)
def test_split_evenly_table_matches(
    embedding: float, head: float, n_layers: int, parts: int, sizes: list[int]
) -> None:
    found = split_evenly(embedding, head, n_layers=n_layers, parts=parts)
    assert sorted(found) == sorted(sizes)


def all_splits(n_layers: int, parts: int) -> list[list[int]]:
    cuts = itertools.combinations(range(1, n_layers), parts - 1)
    return [[b - a for a, b in itertools.pairwise((0, *cut, n_layers))] for cut in cuts]


@pytest.mark.parametrize(("embedding", "head"), [(0.0, 0.0), (0.3, 0.7), (1.5, 1.5), (4.0, 2.0)])
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_split_evenly_costliest_stage_is_minimal(embedding: float, head: float, parts: int) -> None:
    def worst(sizes: list[int]) -> float:
        costs = [*map(float, sizes)]
        costs[0] += embedding
        costs[-1] += head
        return max(costs)

    found = split_evenly(embedding, head, n_layers=9, parts=parts)
    assert len(found) == parts
    assert sum(found) == 9
    assert worst(found) == min(map(worst, all_splits(9, parts)))


def test_layer_costs_counted_in_layers() -> None:
    model = ModelConfig(dim=4096, n_layers=32, n_heads=32, ffn_hidden_dim=11008, vocab_size=32000)
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    assert layer_costs(model) == (32000 * 4096 / layer,) * 2


def test_stages_cover_layers_once_interleaved() -> None:
    model = ModelConfig(n_layers=8)
    stages = make_stages(model, DistributedConfig(pp=2, pp_schedule="interleaved_1f1b"))
    assert [layer for stage in stages for layer in stage.layers] == list(range(8))
    assert [stage.has_embedding for stage in stages] == [True, False, False, False]
    assert [stage.has_head for stage in stages] == [False, False, False, True]
    assert [stage.index for stage in stages_of(stages, 0, 2)] == [0, 2]
    assert [stage.index for stage in stages_of(stages, 1, 2)] == [1, 3]


def test_stages_configured_layer_counts_used() -> None:
    stages = make_stages(ModelConfig(n_layers=8), DistributedConfig(pp=3, pp_layers=[1, 4, 3]))
    assert [len(stage.layers) for stage in stages] == [1, 4, 3]
