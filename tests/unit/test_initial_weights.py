"""Initial weights: the same bits under every layout, and for ever."""

from __future__ import annotations

import math
import platform

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.initial_weights import CONFIG, digest, drawn
from torch import nn
from torch.distributed.tensor import Partial, Placement, Replicate, Shard

from kempnerforge.model import init
from kempnerforge.model.init import init_weights_
from kempnerforge.model.llama import Llama
from kempnerforge.model.sharding import Box, box_of

GOLDEN = {"AVX2": "0ae2dcfbabbc55d7", "AVX512": "0ae2dcfbabbc55d7", "DEFAULT": "5516b38da0744442"}
"""By torch's CPU capability on x86: without AVX2 it computes normal values with other code."""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the recorded bits are those of x86")
def test_init_recorded_values_unchanged() -> None:
    """Runs on record start from these bits."""
    assert digest(drawn((1500, 1000))) == GOLDEN[torch.backends.cpu.get_cpu_capability()]


def test_init_values_normal_and_distinct() -> None:
    """Every block, seed and name has values of its own."""
    values = drawn((3, init.BLOCK_NUMEL))
    assert values.std().item() == pytest.approx(0.02, rel=1e-3)
    assert values.mean().item() == pytest.approx(0, abs=1e-4)
    others = [values[1], values[2], drawn((100,), seed=6), drawn((100,), name="layers.1.attention.wq.weight")]
    for other in others:
        assert not torch.isin(values[0, :100], other.flatten()[:100]).all()


def test_init_values_independent_of_shape() -> None:
    assert torch.equal(drawn((1200, 1000)).flatten(), drawn((1000, 1200)).flatten())


def test_init_every_weight_kind_has_rule() -> None:
    with torch.device("meta"):
        model = Llama(CONFIG)
    model.to_empty(device="cpu")
    before = torch.get_rng_state()
    init_weights_(model, seed=1, init_std=0.02, n_layers=CONFIG.n_layers)
    assert torch.equal(torch.get_rng_state(), before)
    for name, param in model.named_parameters():
        if "norm" in name:
            assert torch.equal(param, torch.ones_like(param))
        else:
            expected = 0.01 if name.endswith(("wo.weight", "w2.weight")) else 0.02
            assert param.std().item() == pytest.approx(expected, rel=0.05), name
    assert model.rope.cos_TP[0].eq(1).all()


def test_init_module_without_rule_refused() -> None:
    with pytest.raises(TypeError, match=r"no rule for the initial value of 0.weight in a Conv1d"):
        init_weights_(nn.Sequential(nn.Conv1d(1, 1, 1)), seed=0, init_std=0.02, n_layers=1)


@given(st.data())
def test_init_pieces_tile_flat_range(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel - 1))
    stop = data.draw(st.integers(start + 1, numel))
    flat = torch.arange(numel).view(shape)
    pieces = list(init._pieces(shape, start, stop))
    covered = [flat[tuple(slice(a, a + n) for a, n in zip(p.start, p.shape, strict=True))] for p in pieces]
    assert torch.cat([part.flatten() for part in covered]).tolist() == list(range(start, stop))
    assert len(pieces) <= 2 * len(shape) - 1


@given(st.data())
def test_box_of_all_ranks_tile_tensor(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    mesh = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    placement = st.one_of(st.just(Replicate()), st.integers(0, len(shape) - 1).map(lambda dim: Shard(dim)))
    placements: list[Placement] = [data.draw(placement) for _ in mesh]
    seen = torch.zeros(shape, dtype=torch.int64)
    for rank in range(math.prod(mesh)):
        coordinate = torch.unravel_index(torch.tensor(rank), mesh)
        box = box_of(shape, mesh, [int(c) for c in coordinate], placements)
        seen[tuple(slice(a, a + n) for a, n in zip(box.start, box.shape, strict=True))] += 1
    copies = math.prod(n for n, p in zip(mesh, placements, strict=True) if isinstance(p, Replicate))
    assert torch.equal(seen, torch.full_like(seen, copies))


def test_box_of_partial_sum_refused() -> None:
    with pytest.raises(ValueError, match="neither a shard nor a replica"):
        box_of((4,), (2,), (0,), (Partial(),))


def test_box_empty_dimension_has_no_elements() -> None:
    assert Box((1, 2), (3, 0)).numel == 0
