"""Packed rows against their documents alone: attention, positions, gradients, block masks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.documents import alone, document_ids, gradients, targets_of
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from kempnerforge.config.schema import ModelConfig
from kempnerforge.model import document_attention as attention
from kempnerforge.model.init import init_weights_
from kempnerforge.model.llama import Llama
from kempnerforge.model.recompute import recompute_activations

VOCABULARY = 61


def rows_of_documents(seq_len: int) -> st.SearchStrategy[list[list[int]]]:
    """Return the lengths of the documents of one to three rows."""
    cuts = st.sets(st.integers(1, seq_len - 1), max_size=seq_len // 2)
    lengths = cuts.map(lambda found: torch.tensor([0, *sorted(found), seq_len]).diff().tolist())
    return st.lists(lengths, min_size=1, max_size=3)


def make(heads: int = 2, max_seq_len: int = 64) -> Llama:
    config = ModelConfig(
        dim=32, n_layers=2, n_heads=4, n_kv_heads=heads, vocab_size=VOCABULARY, max_seq_len=max_seq_len
    )
    model = Llama(config)
    init_weights_(model, seed=3, init_std=0.3, n_layers=2)
    return model


def tokens_like(lengths: Sequence[Sequence[int]]) -> Tensor:
    shape = len(lengths), sum(lengths[0])
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(5))


@settings(deadline=None, max_examples=12)
@given(lengths=rows_of_documents(24), heads=st.sampled_from([1, 2, 4]))
def test_packed_rows_equal_documents_alone(lengths: list[list[int]], heads: int) -> None:
    model, tokens_BT, ids_BT = make(heads), tokens_like(lengths), document_ids(lengths)
    packed, expected = model(tokens_BT, document_ids=ids_BT), alone(model, tokens_BT, lengths)
    torch.testing.assert_close(packed, expected, rtol=1e-5, atol=1e-5)
    targets_BT = targets_of(tokens_BT, ids_BT)
    found, expected = gradients(model, packed, targets_BT), gradients(model, expected, targets_BT)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-5)


def test_packed_rows_without_mask_differ_from_documents_alone() -> None:
    lengths = [[10, 14]]
    model, tokens_BT = make(), tokens_like(lengths)
    with torch.no_grad():
        difference = (model(tokens_BT) - alone(model, tokens_BT, lengths)).abs().amax(-1)[0]
    assert difference[:10].max() < 1e-5
    assert difference[10:].min() > 1e-3


def test_packed_rows_other_document_changes_no_bit() -> None:
    lengths = [[7, 9, 8]]
    model, tokens_BT, ids_BT = make(), tokens_like(lengths), document_ids(lengths)
    other_BT = tokens_BT.clone()
    other_BT[:, :7] = (other_BT[:, :7] + 1) % VOCABULARY
    with torch.no_grad():
        logits, changed = (model(x, document_ids=ids_BT) for x in (tokens_BT, other_BT))
    assert torch.equal(logits[:, 7:], changed[:, 7:])


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_packed_rows_recomputation_changes_no_bit(mode: str) -> None:
    lengths = [[5, 19], [24]]
    tokens_BT, ids_BT = tokens_like(lengths), document_ids(lengths)
    found = []
    for recompute in ("none", mode):
        model = make()
        for block in model.fsdp_units():
            recompute_activations(block, recompute)  # type: ignore[arg-type]
        logits = model(tokens_BT, document_ids=ids_BT)
        found.append(gradients(model, logits, targets_of(tokens_BT, ids_BT)))
    for name, grad in found[0].items():
        assert torch.equal(grad, found[1][name]), name


def test_attention_operator_is_sound_for_compiler() -> None:
    q, k = (torch.randn(2, 9, heads, 6).transpose(1, 2).requires_grad_() for heads in (4, 2))
    mask = attention.document_mask(document_ids([[4, 5], [9]]))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    operator = torch.ops.kempnerforge.document_attention.default
    torch.library.opcheck(operator, (q, k, k, mask), test_utils=checks)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_attention_dtype_is_kept(dtype: torch.dtype) -> None:
    q, k = (torch.randn(1, 9, heads, 6, dtype=dtype).transpose(1, 2) for heads in (4, 2))
    ids_BT = document_ids([[4, 5]])
    mixed = attention.document_attention(q, k, k, attention.document_mask(ids_BT))
    allowed = (ids_BT[:, None, :, None] == ids_BT[:, None, None, :]) & torch.ones(9, 9).tril().bool()
    expected = F.scaled_dot_product_attention(q, k, k, attn_mask=allowed, enable_gqa=True)
    torch.testing.assert_close(mixed, expected)


@settings(deadline=None, max_examples=30)
@given(lengths=rows_of_documents(40))
def test_positions_count_from_zero_in_each_document(lengths: list[list[int]]) -> None:
    expected = [[i for length in row for i in range(length)] for row in lengths]
    assert attention.positions(document_ids(lengths)).tolist() == expected


BLOCK_CASES = {
    "not a multiple of the block": [[100, 1, 199], [300], [128, 127, 45]],
    "documents end with blocks": [[512], [128] * 4, [1] * 512],
    "shorter than a block": [[3, 4], [7]],
}


@pytest.mark.parametrize("name", BLOCK_CASES)
def test_block_mask_equals_that_of_every_pair(name: str) -> None:
    lengths = BLOCK_CASES[name]
    ids_BT, seq_len = document_ids(lengths), sum(lengths[0])
    found = attention.block_mask(ids_BT)
    expected = create_block_mask(found.mask_mod, len(lengths), None, seq_len, seq_len, device="cpu")
    for part in ("kv", "full_kv", "q", "full_q"):
        counts, indices = getattr(found, f"{part}_num_blocks"), getattr(found, f"{part}_indices")
        assert torch.equal(counts, getattr(expected, f"{part}_num_blocks")), part
        used = torch.arange(indices.size(-1)) < counts[..., None]
        assert torch.equal(indices[used], getattr(expected, f"{part}_indices")[used]), part


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("head_dim", [6, 16])
def test_flex_attention_equals_attention_by_document(monkeypatch: pytest.MonkeyPatch, head_dim: int) -> None:
    lengths = [[100, 1, 99], [200]]
    ids_BT = document_ids(lengths)
    q, k, v = (torch.randn(2, heads, 200, head_dim) for heads in (4, 2, 2))
    monkeypatch.setattr(attention, "_fused_flex", lambda: attention.flex_attention)
    found = attention.document_attention(q, k, v, attention.block_mask(ids_BT))
    expected = attention.document_attention(q, k, v, attention.document_mask(ids_BT))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
