"""The rule that decides what is held out: tables, and the share of bytes for any documents."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kempnerforge.data.train_val_split import (
    CUT,
    POOL,
    WHOLE,
    DigestChoice,
    EvenChoice,
    cut_position,
    max_lead_bytes,
    rules_for,
)


@pytest.mark.parametrize(
    ("sizes", "fraction", "may_cut", "expected"),
    [
        pytest.param([1000] * 3000, 0.01, True, WHOLE, id="many records"),
        pytest.param([1000] * 1000, 0.01, True, POOL, id="few records"),
        pytest.param([5_000_000], 0.01, True, CUT, id="a book"),
        pytest.param([5_000_000], 0.01, False, POOL, id="a book that may not be cut"),
        pytest.param([400_000], 0.01, True, POOL, id="a chapter"),
        pytest.param([900_000] * 4, 0.5, True, CUT, id="a few large documents"),
        pytest.param([], 0.01, True, WHOLE, id="nothing"),
    ],
)
def test_rule_by_sizes(sizes: list[int], fraction: float, may_cut: bool, expected: int) -> None:
    rules = rules_for(np.array(sizes, dtype=np.int64), sum(sizes), fraction, may_cut=may_cut)
    assert (rules == expected).all()


@given(
    sizes=st.lists(st.integers(1, 10_000), min_size=1, max_size=300),
    fraction=st.floats(0.001, 0.99),
    digest=st.integers(0, 2**64 - 1),
    cut=st.integers(0, 300),
)
@settings(deadline=None)
def test_even_choice_never_off_by_more_than_a_document(
    sizes: list[int], fraction: float, digest: int, cut: int
) -> None:
    """At every place, and the same when the documents arrive in two parts."""
    array = np.array(sizes, dtype=np.int64)
    lead_bytes = max_lead_bytes(sum(sizes), len(sizes), fraction)
    chosen = EvenChoice(fraction, digest, lead_bytes).choose(array)
    parts = EvenChoice(fraction, digest, lead_bytes)
    assert (np.concatenate([parts.choose(array[:cut]), parts.choose(array[cut:])]) == chosen).all()
    off = np.cumsum(array * chosen) - fraction * np.cumsum(array)
    assert off.max() <= max(sizes)
    assert off.min() >= -(max(sizes) + lead_bytes)


def test_max_lead_huge_document_does_not_raise_it() -> None:
    sizes = [500] * 3000
    assert max_lead_bytes(sum(sizes), len(sizes), 0.01) == 500
    sizes = [800_000] + [500] * 400
    rules = rules_for(np.array(sizes), sum(sizes), 0.01)
    assert (rules == [CUT] + [WHOLE] * 400).all()
    assert max_lead_bytes(sum(sizes), len(sizes), 0.01) == 500


def test_even_choice_does_not_prefer_a_size() -> None:
    generator = np.random.default_rng(0)
    sizes = generator.integers(1, 10_000, 60_000)
    chosen = EvenChoice(0.05, 2**63, float(sizes.mean())).choose(sizes)
    assert abs(sizes[chosen].mean() / sizes.mean() - 1) < 0.05


@given(
    documents=st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(1, 1000)), max_size=300),
    fraction=st.floats(0.01, 0.9),
)
@settings(deadline=None)
def test_digest_choice_limit_gives_the_share(documents: list[tuple[int, int]], fraction: float) -> None:
    digests = np.array([digest for digest, _ in documents], dtype=np.uint64)
    sizes = np.array([size for _, size in documents], dtype=np.int64)
    choice = DigestChoice(fraction)
    for part in (slice(0, 7), slice(7, None)):
        choice.add(digests[part], sizes[part])
    wanted = fraction * float(sizes.sum())
    assert choice.total_bytes == sizes.sum()
    limit = choice.limit(wanted, 0.1 * wanted)
    if limit is not None:
        assert abs(sizes[digests < np.uint64(limit)].sum() - wanted) <= 0.1 * wanted + 1e-6


def test_digest_choice_many_documents_use_the_fraction() -> None:
    """Then the choice for a document does not depend on any other."""
    generator = np.random.default_rng(0)
    for _ in range(5):
        choice = DigestChoice(0.02)
        sizes = generator.integers(900, 1100, 200_000)
        choice.add(generator.integers(0, 2**64, sizes.size, dtype=np.uint64), sizes)
        wanted = 0.02 * float(sizes.sum())
        assert choice.limit(wanted, 0.1 * wanted) == int(0.02 * 2.0**64)


def test_digest_choice_too_few_documents_has_no_limit() -> None:
    choice = DigestChoice(0.01)
    choice.add(np.array([5, 2**63], dtype=np.uint64), np.array([100, 100]))
    assert choice.limit(2.0, 0.2) is None


def cut_of(text: bytes, target: int, slack: float) -> int:
    """The cut of ``text`` in tokens of one byte."""
    array = np.frombuffer(text, dtype=np.uint8)
    return cut_position(np.ones(array.size, np.int64), array == 10, array & 0xC0 != 0x80, target, slack)


@pytest.mark.parametrize(
    ("text", "target", "slack", "expected"),
    [
        pytest.param(b"one\ntwo\nthree\n", 6, 1, 8, id="at a line end"),
        pytest.param(b"one\ntwo\nthree\n", 7, 1, 8, id="at a near line end"),
        pytest.param(b"one\ntwo\nthree\n", 3, 1, 11, id="within a line"),
        pytest.param("aé€b".encode(), 3, 0, 3, id="between characters"),
        pytest.param(b"abc", 0, 0, 3, id="nothing"),
        pytest.param(b"abc", 3, 0, 0, id="everything"),
    ],
)
def test_cut_position_prefers_line_ends(text: bytes, target: int, slack: float, expected: int) -> None:
    assert cut_of(text, target, slack) == expected


@given(text=st.text(max_size=60), target=st.integers(0, 100))
@settings(deadline=None, max_examples=50)
def test_cut_position_keeps_characters_whole(text: str, target: int) -> None:
    raw = text.encode(errors="ignore")
    cut = cut_of(raw, min(target, len(raw)), 2)
    raw[:cut].decode()
    assert abs(len(raw) - cut - min(target, len(raw))) <= 3
