"""Batches and cursors: the same samples in every layout, and an exact continuation from every cursor."""

from __future__ import annotations

import queue
import random
import threading
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kempnerforge.data import loader as loader_module
from kempnerforge.data.loader import AnyBatch, Batch, BatchLoader, Cursor, eval_batches
from kempnerforge.data.rows import Rows
from kempnerforge.data.sample_order import ids_digest, sample_ids
from kempnerforge.data.tokens import Samples, open_dataset
from kempnerforge.errors import DataError

SEQ_LEN = 5
NUM_SAMPLES = 40


@pytest.fixture
def samples(tmp_path) -> Samples:
    """40 samples whose first token is their number times SEQ_LEN."""
    np.save(tmp_path / "tokens.npy", np.arange(NUM_SAMPLES * SEQ_LEN + 1))
    return open_dataset(tmp_path / "tokens.npy", val_fraction=0.0).split("train", SEQ_LEN)


def numbers(batch: Batch) -> list[int]:
    """The sample ids in a batch, in the order in which this rank trains on them."""
    return (batch.inputs_ABT[..., 0] // SEQ_LEN).flatten().tolist()


def token_batch(batch: AnyBatch) -> Batch:
    assert isinstance(batch, Batch)
    return batch


def take(samples: Samples, count: int, **options: Any) -> list[tuple[Batch, Cursor]]:
    settings: dict[str, Any] = {"seed": 3, "global_batch_size": 12, "batch_size": 2} | options
    with BatchLoader(samples, **settings) as loader:
        return [(token_batch(batch), cursor) for batch, cursor in islice(loader, count)]


def same(first: Batch, second: Batch) -> bool:
    return (
        torch.equal(first.inputs_ABT, second.inputs_ABT)
        and torch.equal(first.targets_ABT, second.targets_ABT)
        and (first.digest, first.num_tokens, first.num_samples)
        == (second.digest, second.num_tokens, second.num_samples)
    )


def test_loader_batch_has_samples_in_order(samples):
    (batch, cursor), (second, _) = take(samples, 2)
    ids = sample_ids(3, np.arange(24), NUM_SAMPLES)
    assert numbers(batch) == ids[:12].tolist()
    assert numbers(second) == ids[12:].tolist()
    assert batch.inputs_ABT.shape == batch.targets_ABT.shape == (6, 2, SEQ_LEN)
    assert batch.inputs_ABT.dtype == torch.int64
    assert torch.equal(batch.targets_ABT, batch.inputs_ABT + 1)
    assert batch.targets_ABT.is_contiguous()
    assert (batch.num_samples, batch.num_tokens) == (12, 12 * SEQ_LEN)
    assert batch.digest == ids_digest(ids[:12])
    assert cursor == Cursor(12)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("dp_size", [1, 2, 3, 6])
def test_loader_global_batch_same_for_any_ranks(samples, dp_size, batch_size):
    reference = take(samples, 10, batch_size=1)
    ranks = [
        take(samples, 10, batch_size=batch_size, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)
    ]
    for step, (whole, cursor) in enumerate(reference):
        parts = [batches[step][0] for batches in ranks]
        assert {part.digest for part in parts} == {whole.digest}
        assert {part.num_tokens for part in parts} == {whole.num_tokens}
        assert {batches[step][1] for batches in ranks} == {cursor}
        # Micro-batches, put back in the order in which they were dealt out.
        together = torch.stack([part.inputs_ABT for part in parts], dim=1)
        assert torch.equal(together.reshape(-1, SEQ_LEN), whole.inputs_ABT.reshape(-1, SEQ_LEN))


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_loader_epoch_has_every_sample_once(samples, dp_size):
    options = {"global_batch_size": 8, "batch_size": 2, "dp_size": dp_size}
    for epoch in range(3):
        cursor = Cursor(epoch * NUM_SAMPLES)
        seen = [
            number
            for rank in range(dp_size)
            for batch, _ in take(samples, 5, dp_rank=rank, cursor=cursor, **options)
            for number in numbers(batch)
        ]
        assert sorted(seen) == list(range(NUM_SAMPLES))


def test_loader_batches_cross_epoch_ends(samples):
    seen = [number for batch, _ in take(samples, 10) for number in numbers(batch)]
    assert len(seen) == 3 * NUM_SAMPLES
    for epoch in range(3):
        assert sorted(seen[epoch * NUM_SAMPLES : (epoch + 1) * NUM_SAMPLES]) == list(range(NUM_SAMPLES))


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("resumed_prefetch", [0, 2])
def test_loader_resume_any_cursor_continues_exactly(samples, prefetch, resumed_prefetch):
    whole = take(samples, 12, prefetch_batches=prefetch)
    for place, (_, cursor) in enumerate(whole[:-1]):
        restored = Cursor.from_json(cursor.to_json())
        rest = take(samples, 11 - place, cursor=restored, prefetch_batches=resumed_prefetch)
        for (batch, after), (expected, expected_after) in zip(rest, whole[place + 1 :], strict=True):
            assert same(batch, expected)
            assert after == expected_after


def test_loader_resume_other_ranks_same_samples(samples):
    whole = take(samples, 6)
    _, cursor = take(samples, 3, dp_rank=1, dp_size=2)[-1]
    rest = [take(samples, 3, dp_rank=rank, dp_size=3, cursor=cursor) for rank in range(3)]
    for step in range(3):
        expected = whole[3 + step][0]
        assert {batches[step][0].digest for batches in rest} == {expected.digest}
        assert sorted(number for batches in rest for number in numbers(batches[step][0])) == sorted(
            numbers(expected)
        )


class Failing:
    """Samples on a disk that fails after some reads."""

    seq_len = SEQ_LEN
    num_samples = NUM_SAMPLES

    def __init__(self, samples: Samples, sound_reads: int) -> None:
        self.samples = samples
        self.left = sound_reads

    def read(self, ids: np.ndarray) -> Rows:
        if self.left == 0:
            raise DataError("the disk is gone")
        self.left -= 1
        return self.samples.read(ids)


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_loader_read_error_raised_at_its_batch(samples, prefetch):
    options = {"seed": 0, "global_batch_size": 4, "batch_size": 2, "prefetch_batches": prefetch}
    with BatchLoader(Failing(samples, 3), **options) as loader:  # type: ignore[arg-type]
        assert len(list(islice(loader, 3))) == 3
        for _ in range(2):
            with pytest.raises(DataError, match="the disk is gone"):
                next(loader)


def data_threads() -> int:
    return sum(thread.name == "kempnerforge-data" for thread in threading.enumerate())


def test_loader_close_in_any_state_ends_thread(samples):
    for consumed in range(4):
        loader = BatchLoader(samples, seed=0, global_batch_size=4, batch_size=2, prefetch_batches=2)
        assert data_threads() == 1
        list(islice(loader, consumed))
        loader.close()
        assert data_threads() == 0
        loader.close()
        with pytest.raises(RuntimeError, match="closed"):
            next(loader)
    loader = BatchLoader(Failing(samples, 0), seed=0, global_batch_size=4, batch_size=2)  # type: ignore[arg-type]
    loader.close()
    assert data_threads() == 0


def test_loader_prefetch_is_bounded(samples, monkeypatch):
    """It reads no more than fit in the queue, and one that its thread waits with."""
    source = Failing(samples, 1000)
    # 20 that were consumed, three in the queue and one in the thread's hands.
    expected = 20 + 3 + 1
    waits = threading.Event()

    class WatchedQueue(queue.Queue):
        """Tells when the thread is about to wait, with the last batch that it may read."""

        def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
            if self.full() and 1000 - source.left == expected:
                waits.set()
            super().put(item, block, timeout)

    monkeypatch.setattr(loader_module, "queue", SimpleNamespace(Queue=WatchedQueue))
    with BatchLoader(source, seed=0, global_batch_size=4, batch_size=2, prefetch_batches=3) as loader:  # type: ignore[arg-type]
        for _ in range(20):
            next(loader)
        assert waits.wait(60), f"{1000 - source.left} batches were read, and the queue is not full"
        assert 1000 - source.left == expected


def test_loader_global_random_state_untouched(samples):
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    of_numpy = np.random.get_state(legacy=False)["state"]["key"].copy()
    before = (torch.get_rng_state(), random.getstate(), of_numpy)
    take(samples, 5)
    list(eval_batches(samples, num_batches=2, global_batch_size=4, batch_size=2))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state(legacy=False)["state"]["key"] == before[2]).all()


@pytest.mark.parametrize(
    "layout",
    [
        {"global_batch_size": 10, "batch_size": 3},
        {"global_batch_size": 12, "batch_size": 2, "dp_size": 4},
        {"global_batch_size": 0, "batch_size": 2},
    ],
)
def test_loader_indivisible_layout_refused(samples, layout):
    with pytest.raises(ValueError, match="is not a multiple of"):
        BatchLoader(samples, seed=0, **layout)
    assert data_threads() == 0


def test_loader_rank_outside_layout_refused(samples):
    with pytest.raises(ValueError, match="dp_rank 2 is not below dp_size 2"):
        BatchLoader(samples, seed=0, global_batch_size=4, batch_size=1, dp_rank=2, dp_size=2)


@pytest.mark.parametrize("value", [{}, {"samples": -1}, {"samples": 1.5}, {"samples": True}, {"step": 3}, 12])
def test_cursor_invalid_value_refused(value):
    with pytest.raises(ValueError, match="cursor"):
        Cursor.from_json(value)


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_eval_batches_same_samples_every_time(samples, dp_size):
    options = {"num_batches": 3, "global_batch_size": 16, "batch_size": 2, "dp_size": dp_size}
    ranks, again = (
        [[*map(token_batch, eval_batches(samples, dp_rank=rank, **options))] for rank in range(dp_size)]
        for _ in range(2)
    )
    for first, second in zip(ranks, again, strict=True):
        assert all(same(batch, repeated) for batch, repeated in zip(first, second, strict=True))
    for step in range(3):
        parts = [batches[step] for batches in ranks]
        expected = [number % NUM_SAMPLES for number in range(16 * step, 16 * step + 16)]
        assert sorted(number for part in parts for number in numbers(part)) == sorted(expected)
        assert {part.digest for part in parts} == {ids_digest(np.array(expected))}
        assert {part.num_samples for part in parts} == {16}
