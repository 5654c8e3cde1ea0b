"""The sample at each position of the training order: a pure, seekable function with O(1) memory.

Position ``p`` of a run over ``n`` samples is in epoch ``p // n``. Each epoch visits every sample
exactly once, in its own pseudo-random order: a keyed permutation of ``{0 .. n-1}`` that is
evaluated at one point without computing the others.

The permutation is a balanced Feistel network (Luby and Rackoff, "How to construct pseudorandom
permutations from pseudorandom functions", SIAM J. Comput. 17, 1988) over the smallest power of four
that is not below ``n``, with cycle walking to remain below ``n`` (Black and Rogaway, "Ciphers with
arbitrary finite domains", CT-RSA 2002). The round function is the finaliser of SplitMix64 (Steele,
Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), which also derives
the round keys from the seed and the epoch.

This module uses neither torch nor global random state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import xxhash

ORDER_NAME = "feistel8-splitmix64"
"""Name of the algorithm, stored in the data fingerprint. Change it when the same seed gives another order."""

_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_MASK_64 = (1 << 64) - 1
MAX_SAMPLES = 1 << 62


class Order(Protocol):
    """Which sample stands at each position of the training order: a pure function."""

    def ids_at(self, positions: np.ndarray) -> np.ndarray:
        """Return the ids of the samples at ``positions``, both int64 [N]."""
        ...

    def digest(self, ids: np.ndarray) -> str:
        """Return the xxh3-64, 16 hexadecimal digits, of the samples ``ids`` [N]."""
        ...

    def sources_of(self, ids: np.ndarray) -> np.ndarray | None:
        """Return the number of the source of each sample, int64 [N]. None if there is only one source."""
        ...


@dataclass(frozen=True)
class ShuffledOrder:
    """Epochs of one set of samples, each in its own order."""

    seed: int
    num_samples: int

    def ids_at(self, positions: np.ndarray) -> np.ndarray:
        """Return the ids of the samples at ``positions``, both int64 [N]."""
        return sample_ids(self.seed, positions, self.num_samples)

    def digest(self, ids: np.ndarray) -> str:
        """Return the digest of the samples ``ids`` [N]."""
        return ids_digest(ids)

    def sources_of(self, ids: np.ndarray) -> None:
        """Return None: there is only one source."""


def sample_ids(seed: int, positions: np.ndarray, num_samples: int) -> np.ndarray:
    """Return the samples at ``positions`` of the order of ``seed``.

    ``positions`` is int64 [N], each at least 0. The result is int64 [N], each below
    ``num_samples``. Any sequence of ``num_samples`` positions that begins at a multiple of it is a
    permutation.

    Raises ValueError for a negative position or ``num_samples`` outside [1, 2^62].
    """
    if not 1 <= num_samples <= MAX_SAMPLES:
        raise ValueError(f"num_samples must be 1 to 2^62, not {num_samples}")
    positions = np.asarray(positions, dtype=np.int64)
    if positions.size and positions.min() < 0:
        raise ValueError("positions must not be negative")
    epochs, indices = np.divmod(positions, num_samples)
    keys = _round_keys(seed, epochs.astype(np.uint64))
    return _permute(indices.astype(np.uint64), num_samples, keys).astype(np.int64)


def ids_digest(ids: np.ndarray) -> str:
    """Return the xxh3-64, 16 hexadecimal digits, of ``ids`` [N] as little-endian int64."""
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(ids, dtype="<i8").tobytes())


def _permute(indices: np.ndarray, num_samples: int, keys: np.ndarray) -> np.ndarray:
    """Apply the permutation with round keys ``keys`` [rounds, N] to ``indices`` [N], all uint64."""
    half_bits = max(1, ((num_samples - 1).bit_length() + 1) // 2)
    result = _feistel(indices, keys, half_bits)
    outside = np.flatnonzero(result >= num_samples)
    while outside.size:
        walked = _feistel(result[outside], keys[:, outside], half_bits)
        result[outside] = walked
        outside = outside[walked >= num_samples]
    return result


def _feistel(values: np.ndarray, keys: np.ndarray, half_bits: int) -> np.ndarray:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (mix(right ^ key) & mask)
    return (left << shift) | right


def _round_keys(seed: int, epochs: np.ndarray) -> np.ndarray:
    """Return the keys, uint64 [rounds, N], for the seed and the epoch [N] of every position."""
    start = mix(np.array([seed & _MASK_64], dtype=np.uint64))
    state = mix(epochs * np.uint64(_GOLDEN) + start)
    steps = np.array([(number + 1) * _GOLDEN & _MASK_64 for number in range(_ROUNDS)], dtype=np.uint64)
    return mix(state[None, :] + steps[:, None])


def mix(values: np.ndarray) -> np.ndarray:
    """Apply the finaliser of SplitMix64, a bijection of uint64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
