"""The training order: a permutation for every epoch, seekable, and the same in every version."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kempnerforge.data.sample_order import MAX_SAMPLES, ids_digest, sample_ids


@pytest.mark.parametrize("num_samples", [*range(1, 70), 255, 256, 257, 1000, 4095, 4096, 4097, 100_003])
def test_order_epoch_visits_every_sample_once(num_samples):
    ids = sample_ids(3, np.arange(3 * num_samples), num_samples).reshape(3, num_samples)
    assert (np.sort(ids, axis=1) == np.arange(num_samples)).all()


@given(
    seed=st.integers(0, 2**64 - 1),
    num_samples=st.integers(1, MAX_SAMPLES),
    positions=st.lists(st.integers(0, 2**62), min_size=1, max_size=20),
)
@settings(max_examples=100, deadline=None)
def test_order_place_independent_of_other_places(seed, num_samples, positions):
    together = sample_ids(seed, np.array(positions), num_samples)
    alone = [int(sample_ids(seed, np.array([position]), num_samples)[0]) for position in positions]
    assert together.tolist() == alone
    assert together.dtype == np.int64
    assert 0 <= together.min() <= together.max() < num_samples


@given(
    seed=st.integers(0, 2**32),
    num_samples=st.integers(2, 2**50),
    start=st.integers(0, 2**40),
    count=st.integers(2, 300),
)
@settings(max_examples=100, deadline=None)
def test_order_large_epoch_no_sample_twice(seed, num_samples, start, count):
    indices = np.unique((start + np.arange(count)) % num_samples)
    ids = sample_ids(seed, 5 * num_samples + indices, num_samples)
    assert np.unique(ids).size == indices.size


def test_order_differs_by_seed_and_epoch():
    size = 1000
    orders = {
        tuple(sample_ids(seed, np.arange(epoch * size, (epoch + 1) * size), size))
        for seed in (0, 1, 2, -1, 2**40)
        for epoch in (0, 1, 2, 1000)
    }
    assert len(orders) == 20
    assert tuple(range(size)) not in orders


def test_order_statistics_look_random():
    size, epochs = 50, 4000
    ids = sample_ids(11, np.arange(size * epochs), size).reshape(epochs, size)
    # Each sample stands at each place about epochs / size = 80 times; 6 standard deviations are 54.
    counts = np.stack([np.bincount(column, minlength=size) for column in ids.T])
    assert abs(counts - epochs / size).max() < 54
    # Neighbours follow each other by chance only: expected 1 of 50, so 3920 of 196,000, deviation 62.
    followers = (np.diff(ids, axis=1) % size == 1).sum()
    assert abs(followers - 3920) < 400


def test_order_three_samples_all_orders_equally_often():
    orders = sample_ids(5, np.arange(18_000), 3).reshape(-1, 3)
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert counts.size == 6
    assert abs(counts - 1000).max() < 180  # 6 standard deviations


def test_order_recorded_values_unchanged():
    assert sample_ids(42, np.arange(8), 1000).tolist() == [434, 418, 240, 990, 300, 679, 853, 473]
    assert ids_digest(sample_ids(42, np.arange(2500), 1000)) == "dd1b2c9292f154bf"
    assert ids_digest(sample_ids(7, np.arange(10**12, 10**12 + 1000), 10**9 + 7)) == "424d32b634ea9180"
    assert ids_digest(np.array([1, 2, 3])) == "7c68b4906e7ea780"


@given(
    seed=st.integers(-(2**63), 2**64 - 1),
    num_samples=st.integers(1, 2**62),
    position=st.integers(0, 2**63 - 1),
)
@settings(max_examples=200, deadline=None)
def test_order_arrays_match_plain_integers(seed, num_samples, position):
    assert sample_ids(seed, np.array([position]), num_samples)[0] == _plain(seed, position, num_samples)


def _plain(seed: int, position: int, num_samples: int) -> int:
    golden, word = 0x9E3779B97F4A7C15, 2**64 - 1

    def mix(value: int) -> int:
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & word
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB & word
        return value ^ (value >> 31)

    epoch, index = divmod(position, num_samples)
    state = mix(epoch * golden + mix(seed & word) & word)
    half_bits = 1
    while 4**half_bits < num_samples:
        half_bits += 1
    half = 2**half_bits
    while True:
        left, right = divmod(index, half)
        for number in range(1, 9):
            left, right = right, left ^ mix(right ^ mix(state + number * golden & word)) % half
        index = left * half + right
        if index < num_samples:
            return index


def test_ids_digest_depends_on_values_and_order_only():
    ids = np.arange(10)
    assert ids_digest(ids) == ids_digest(ids.astype(np.int32)) == ids_digest(np.repeat(ids, 2)[::2])
    assert ids_digest(ids) != ids_digest(ids[::-1])


def test_order_global_random_state_untouched():
    np.random.seed(1)
    before = np.random.get_state(legacy=False)["state"]["key"].copy()
    sample_ids(1, np.arange(1000), 77)
    assert (np.random.get_state(legacy=False)["state"]["key"] == before).all()


@pytest.mark.parametrize("num_samples", [0, -1, MAX_SAMPLES + 1])
def test_order_impossible_size_refused(num_samples):
    with pytest.raises(ValueError, match="num_samples"):
        sample_ids(0, np.arange(3), num_samples)


def test_order_negative_position_refused():
    with pytest.raises(ValueError, match="negative"):
        sample_ids(0, np.array([3, -1]), 10)
