"""Several sources of tokens as one training order: a pure, seekable function, as that of one source.

The order is divided into phases, each with its own weights. ``mixture_schedule`` says whose turn a
position is. The ``j``-th sample that is drawn of a source, over all phases, is that at position ``j``
of ``sample_order`` with a seed of the source: its epochs are its own, and each visits every sample
once. Neither the seed nor the digest of a source depends on the other sources or on its place in
the list, so that sources can be added. This module does not import torch.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from kempnerforge.data.mixture_schedule import Schedule, schedule, turns_of_phase
from kempnerforge.data.rows import Rows
from kempnerforge.data.sample_order import sample_ids
from kempnerforge.data.tokens import Samples, TokenDataset
from kempnerforge.errors import DataError

SAME_TOKENIZER = "Prepare all sources with the same tokenizer: kempnerforge data prepare"


@dataclass(frozen=True)
class Phase:
    """A stretch of the training order in which the weights stay the same."""

    start_step: int
    start: int
    """Its first position: samples that are consumed before ``start_step``."""
    weights: tuple[int, ...]
    """Of each source, in parts of a million."""


@dataclass(frozen=True)
class SourceEnd:
    """Where a source that is not repeated is used up."""

    name: str
    position: int
    """The first position that would repeat one of its samples."""


class MixtureOrder:
    """The training order of a mixture. Sample ``i`` of a source has the id ``i`` + the sizes of those before.

    Args:
        sizes: name of each source -> its number of samples. Sources whose turns have the same deadline
            come in this order.
        phases: by increasing start, the first of which is 0.
        seed: the seed of the run.
    """

    def __init__(self, sizes: Mapping[str, int], phases: Sequence[Phase], seed: int) -> None:
        self.names = tuple(sizes)
        self.sizes = tuple(sizes.values())
        self.phases = tuple(phases)
        self._starts = np.array([phase.start for phase in phases], dtype=np.int64)
        self._seeds = [source_seed(seed, name) for name in self.names]
        self._firsts = np.cumsum([0, *self.sizes], dtype=np.int64)
        self._keys = np.array(
            [xxhash.xxh3_64_intdigest(name.encode()) for name in self.names], dtype=np.uint64
        )

    def ids_at(self, positions: np.ndarray) -> np.ndarray:
        """Return the ids of the samples at ``positions``, both int64 [N]."""
        sources, draws = self.draws_at(positions)
        ids = np.empty_like(sources)
        for source in np.unique(sources):
            own = sources == source
            samples = sample_ids(self._seeds[source], draws[own], self.sizes[source])
            ids[own] = self._firsts[source] + samples
        return ids

    def draws_at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the source at each of ``positions``, and how many samples of it were drawn before.

        All are int64 [N].
        """
        positions = np.asarray(positions, dtype=np.int64)
        sources, draws = np.empty_like(positions), np.empty_like(positions)
        numbers = np.searchsorted(self._starts, positions, side="right") - 1
        for number in np.unique(numbers):
            here = numbers == number
            sources[here], turns = self._schedule(number).turns_at(positions[here] - self._starts[number])
            draws[here] = turns + self._drawn[number][sources[here]]
        return sources, draws

    def digest(self, ids: np.ndarray) -> str:
        """Return the xxh3-64, 16 hexadecimal digits, of the pairs of source and sample of ``ids`` [N]."""
        sources = self.sources_of(ids)
        pairs = np.stack([self._keys[sources], (ids - self._firsts[sources]).astype(np.uint64)], axis=-1)
        return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(pairs, dtype="<u8").tobytes())

    def sources_of(self, ids: np.ndarray) -> np.ndarray:
        """Return the number of the source of each sample, int64 [N]."""
        return np.searchsorted(self._firsts, ids, side="right") - 1

    def samples_of(self, ids: np.ndarray) -> np.ndarray:
        """Return the number of each sample within its source, int64 [N]."""
        return ids - self._firsts[self.sources_of(ids)]

    def epochs(self, position: int) -> dict[str, float]:
        """Return the epochs of each source before ``position``: samples drawn, divided by its samples."""
        number = self._number_at(position)
        drawn = self._drawn[number] + self._schedule(number).counts(position - self.phases[number].start)
        return {name: int(n) / size for name, n, size in zip(self.names, drawn, self.sizes, strict=True)}

    def weights_at(self, position: int) -> dict[str, int]:
        """Return the weights of the sources at ``position``, in parts of a million."""
        return dict(zip(self.names, self.phases[self._number_at(position)].weights, strict=True))

    def position_of(self, source: int, draw: int) -> int | None:
        """Return the position of a draw (from 0) of a source. None if it is never drawn so often."""
        for number, phase in enumerate(self.phases):
            if number + 1 < len(self.phases) and draw >= self._drawn[number + 1][source]:
                continue
            turn = draw - int(self._drawn[number][source])
            place = self._schedule(number).position_of(source, turn)
            return None if place is None else phase.start + place
        return None

    def _number_at(self, position: int) -> int:
        return int(np.searchsorted(self._starts, position, side="right")) - 1

    def _length(self, number: int) -> int | None:
        """Return the number of positions of a phase. The last one has no end."""
        is_last = number + 1 == len(self.phases)
        return None if is_last else self.phases[number + 1].start - self.phases[number].start

    def _schedule(self, number: int) -> Schedule:
        return schedule(self.phases[number].weights, self._length(number))

    @functools.cached_property
    def _drawn(self) -> list[np.ndarray]:
        """How many samples of each source are drawn before each phase, int64 [sources]."""
        drawn = [np.zeros(len(self.names), dtype=np.int64)]
        for number in range(len(self.phases) - 1):
            length = self._length(number)
            assert length is not None
            drawn.append(drawn[-1] + turns_of_phase(self.phases[number].weights, length))
        return drawn


class MixtureSamples:
    """The samples of all sources for training, numbered as in ``order``."""

    has_tokens = True
    """As ``MapSamples.has_tokens``."""

    def __init__(self, samples: Sequence[Samples], order: MixtureOrder, stops: Sequence[bool]) -> None:
        self.order = order
        self.num_samples = sum(order.sizes)
        self.seq_len = samples[0].seq_len
        self._samples = tuple(samples)
        self._stops = tuple(stops)
        none = [part.read(np.empty(0, dtype=np.int64)) for part in samples]
        # All ranks alike, whatever the sources of their rows are.
        self._has_counted = any(rows.counted is not None for rows in none)
        self._has_documents = any(rows.document_ids is not None for rows in none)

    def read(self, ids: np.ndarray) -> Rows:
        """Return samples ``ids`` [N]. Raises as ``Samples.read``."""
        sources, numbers = self.order.sources_of(ids), self.order.samples_of(ids)
        found = [(np.flatnonzero(sources == source), int(source)) for source in np.unique(sources)]
        parts = [(places, self._samples[source].read(numbers[places])) for places, source in found]
        tokens = np.empty((len(ids), self.seq_len + 1), dtype=np.int64)
        counted = np.ones((len(ids), self.seq_len), dtype=np.bool_)
        document_ids = np.zeros((len(ids), self.seq_len), dtype=np.int32)
        for places, rows in parts:
            tokens[places] = rows.tokens
            # Without them, all targets count, and a row is one document.
            if rows.counted is not None:
                counted[places] = rows.counted
            if rows.document_ids is not None:
                document_ids[places] = rows.document_ids
        return Rows(
            tokens, counted if self._has_counted else None, document_ids if self._has_documents else None
        )

    @functools.cached_property
    def end(self) -> SourceEnd | None:
        """Where the first source that is not repeated is used up. None if that never happens."""
        found = [
            SourceEnd(self.order.names[source], position)
            for source, stops in enumerate(self._stops)
            if stops
            if (position := self.order.position_of(source, self.order.sizes[source])) is not None
        ]
        return min(found, key=lambda end: end.position, default=None)


class MixtureDataset:
    """The data of several sources. Has what training needs of a ``TokenDataset``.

    Args:
        sources: name -> data. All have the same tokenizer, as far as it is known.
        weights: step from which on they are in force -> the weight of each source, in parts of a
            million. The first step is 0.
        stops: the sources that are not repeated.
        seed: the seed of the run.
        global_batch_size: samples of a step.

    Raises DataError for sources with different tokenizers or separators.
    """

    has_tokens = True
    """As ``MapDataset.has_tokens``."""

    def __init__(
        self,
        sources: Mapping[str, TokenDataset],
        weights: Mapping[int, Mapping[str, int]],
        *,
        stops: Sequence[str] = (),
        seed: int,
        global_batch_size: int,
    ) -> None:
        self.sources = dict(sorted(sources.items()))
        """By name, in alphabetical order, so that the order in the config does not matter."""
        self.phases = [
            Phase(step, step * global_batch_size, tuple(parts[name] for name in self.sources))
            for step, parts in weights.items()
        ]
        self._stops, self._seed = stops, seed
        if conflict := tokenizer_conflict(self.sources):
            raise DataError(f"data.sources: {conflict}. {SAME_TOKENIZER}")

    def split(self, name: str, seq_len: int) -> MixtureSamples:
        """Return the samples to train on; ``name`` is ``"train"``.

        Raises :class:`DataError` if a source has none.
        """
        samples = [dataset.split(name, seq_len) for dataset in self.sources.values()]
        sizes = {source: part.num_samples for source, part in zip(self.sources, samples, strict=True)}
        order = MixtureOrder(sizes, self.phases, self._seed)
        return MixtureSamples(samples, order, [source in self._stops for source in self.sources])

    def validation(self, seq_len: int) -> dict[str, Samples]:
        """Return the held-out samples of each source. Raises :class:`DataError` if a source has none."""
        return {name: dataset.split("val", seq_len) for name, dataset in self.sources.items()}


def source_seed(seed: int, name: str) -> int:
    """Return the seed of the order of a source's samples."""
    return xxhash.xxh3_64_intdigest(f"{seed}\0{name}".encode())


def describe_weights(weights: Mapping[str, int]) -> str:
    """Return weights in parts of a million as ``web 70%, books 30%``, without those that are 0."""
    return ", ".join(f"{name} {part / 10_000:g}%" for name, part in weights.items() if part)


def tokenizer_conflict(sources: Mapping[str, TokenDataset]) -> str | None:
    """Return how two sources have different tokens; None if none have. ``.npy`` shards do not know theirs."""
    known = {name: dataset.index for name, dataset in sources.items() if dataset.index is not None}
    for (first, one), (second, other) in itertools.pairwise(known.items()):
        if one.tokenizer_digest != other.tokenizer_digest:
            return (
                f'"{first}" and "{second}" have different tokenizers, {one.tokenizer} and {other.tokenizer}'
            )
        if one.separator_id != other.separator_id:
            ids = f"{one.separator_id} and {other.separator_id}"
            return f'"{first}" and "{second}" have different separators of documents, {ids}'
    return None
