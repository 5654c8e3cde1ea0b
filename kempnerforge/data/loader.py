"""Batches for one data-parallel rank, each with the cursor from which a resume continues.

The samples of a step's global batch depend only on the seed and the cursor. A global batch is
divided into micro-batches of ``batch_size`` in the order of its samples, and data-parallel rank
``m % dp_size`` gets micro-batch ``m``. The micro-batches are the same for any number of ranks.
"""

from __future__ import annotations

import functools
import queue
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch

from kempnerforge.data.map_dataset import MapSamples
from kempnerforge.data.mixture import MixtureSamples
from kempnerforge.data.sample_order import Order, ShuffledOrder
from kempnerforge.data.tokens import Samples
from kempnerforge.data.worker_pool import WorkerPool

AnySamples = Samples | MapSamples | MixtureSamples
"""What can be trained on."""


@dataclass(frozen=True)
class Cursor:
    """A position in the training order."""

    samples: int = 0
    """Samples that all ranks together have consumed."""

    def __post_init__(self) -> None:
        if type(self.samples) is not int or self.samples < 0:
            raise ValueError(f"a cursor is a number of samples, at least 0, not {self.samples!r}")

    def to_json(self) -> dict[str, Any]:
        """Return the cursor as JSON values, for a checkpoint."""
        return {"samples": self.samples}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Cursor:
        """Parse the result of :meth:`to_json`. Raises ValueError for anything else."""
        if not isinstance(value, dict) or value.keys() != {"samples"}:
            raise ValueError(f"not a cursor: {value!r}")
        return cls(value["samples"])


@dataclass(frozen=True)
class Batch:
    """This rank's part of one global batch. Shape suffixes: A accumulation steps, B batch_size, T seq_len."""

    inputs_ABT: torch.Tensor
    """Token ids, int64."""
    targets_ABT: torch.Tensor
    """The token after each input, int64. ``IGNORED`` where it does not count."""
    num_tokens: int | None
    """Targets of the whole global batch, over all ranks. None where some do not count: then only the
    ranks together know how many do."""
    num_samples: int
    """Sequences of the whole global batch."""
    digest: str
    """xxh3-64 of the global batch's sample ids in order, with a mixture also of their sources; the same on
    every rank and in every layout."""
    document_ids_ABT: torch.Tensor | None = None
    """The document of each input, int32: numbers that increase within a row. None without a document mask."""
    sources_AB: torch.Tensor | None = None
    """The number of the source of each row, int64. None without a mixture."""


@dataclass(frozen=True)
class FieldsBatch:
    """This rank's part of one global batch of a dataset whose samples are dicts."""

    micro_batches: list[dict[str, torch.Tensor]]
    """Name -> stacked values [B, ...] of each micro-batch."""
    num_samples: int
    """Samples of the whole global batch."""
    digest: str
    """As ``Batch.digest``."""
    num_tokens: int = 0
    """There are none: the model counts items."""


AnyBatch = Batch | FieldsBatch


@dataclass(frozen=True)
class BatchShape:
    """How a global batch is distributed over the data-parallel ranks.

    Raises ValueError if ``global_batch_size`` is not a multiple of ``batch_size * dp_size``.
    """

    global_batch_size: int
    batch_size: int
    dp_rank: int
    dp_size: int

    def __post_init__(self) -> None:
        if self.global_batch_size < 1 or self.global_batch_size % (self.batch_size * self.dp_size):
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of "
                f"batch_size {self.batch_size} x {self.dp_size} data-parallel ranks"
            )
        if not 0 <= self.dp_rank < self.dp_size:
            raise ValueError(f"dp_rank {self.dp_rank} is not below dp_size {self.dp_size}")

    def read(self, samples: AnySamples, ids: np.ndarray) -> AnyBatch:
        """Read this rank's part of the global batch ``ids`` [global_batch_size]."""
        order = order_of(samples, seed=0)  # the digest of given samples depends on no seed
        own_ids = ids.reshape(-1, self.dp_size, self.batch_size)[:, self.dp_rank]
        if isinstance(samples, MapSamples) and not samples.has_tokens:
            micro_batches = [samples.read_fields(ids_B) for ids_B in own_ids]
            return FieldsBatch(micro_batches, ids.size, order.digest(ids))
        rows = samples.read(own_ids.reshape(-1))
        sources = order.sources_of(own_ids)
        return Batch(
            inputs_ABT=self._stacked(rows.inputs),
            targets_ABT=self._stacked(rows.targets),
            num_tokens=ids.size * samples.seq_len if rows.counted is None else None,
            num_samples=ids.size,
            digest=order.digest(ids),
            document_ids_ABT=None if rows.document_ids is None else self._stacked(rows.document_ids),
            sources_AB=None if sources is None else torch.from_numpy(sources),
        )

    def _stacked(self, values_NT: np.ndarray) -> torch.Tensor:
        """Return the values of a rank's samples as [A, B, T]."""
        # NumPy makes the copy: torch would start a thread pool for the prefetching thread.
        copy_NT = np.ascontiguousarray(values_NT)
        return torch.from_numpy(copy_NT.reshape(-1, self.batch_size, values_NT.shape[-1]))


class BatchLoader:
    """An endless iterator of ``(batch, cursor)``, where ``cursor`` is the position after ``batch``.

    A loader that starts from the cursor of another loader yields exactly the batches that followed
    it, however far the other had read ahead and whatever its layout. No global random state is
    used.

    A background thread reads ``prefetch_batches`` batches ahead. With 0, ``next`` reads each batch.
    With ``num_workers``, as many processes read a batch each, of a dataset of the user's.
    An exception while reading is raised by the ``next`` for that batch. :meth:`close`, or leaving a
    ``with`` block, ends the thread and the workers.

    Raises ValueError if ``global_batch_size`` is not a multiple of ``batch_size * dp_size``.
    """

    def __init__(
        self,
        samples: AnySamples,
        *,
        seed: int,
        global_batch_size: int,
        batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        cursor: Cursor | None = None,
        prefetch_batches: int = 2,
        num_workers: int = 0,
    ) -> None:
        shape = BatchShape(global_batch_size, batch_size, dp_rank, dp_size)
        self._pool: WorkerPool | None = None
        if num_workers:
            if not isinstance(samples, MapSamples):
                raise ValueError("num_workers is for a dataset of the user's")
            reader = functools.partial(shape.read, samples)
            self._pool = WorkerPool(reader, name=samples.dataset.name, num_workers=num_workers)
        self._source = _Source(samples, order_of(samples, seed), shape, cursor or Cursor(), self._pool)
        self._prefetcher = _Prefetcher(self._source, prefetch_batches) if prefetch_batches else None
        self._closed = False

    def __iter__(self) -> BatchLoader:
        return self

    def __next__(self) -> tuple[AnyBatch, Cursor]:
        if self._closed:
            raise RuntimeError("the batch loader is closed")
        return self._prefetcher.next() if self._prefetcher else self._source.next()

    def close(self) -> None:
        """End the background thread and the workers. The loader yields no more batches."""
        self._closed = True
        if self._pool:
            self._pool.kill()  # the thread may wait for a batch
        if self._prefetcher:
            self._prefetcher.close()
        if self._pool:
            self._pool.close()

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def order_of(samples: AnySamples, seed: int) -> Order:
    """Return the training order of ``samples``. A mixture knows its own, and its seed."""
    return samples.order if isinstance(samples, MixtureSamples) else ShuffledOrder(seed, samples.num_samples)


def batch_ids(cursor: Cursor, order: Order, global_batch_size: int) -> np.ndarray:
    """Return the sample ids of the global batch at ``cursor``, in order, int64 [global_batch_size]."""
    start = cursor.samples
    return order.ids_at(np.arange(start, start + global_batch_size, dtype=np.int64))


class _Source:
    """Reads one batch after the other, in the calling thread or in workers."""

    def __init__(
        self,
        samples: AnySamples,
        order: Order,
        shape: BatchShape,
        cursor: Cursor,
        pool: WorkerPool | None,
    ) -> None:
        self._samples = samples
        self._order = order
        self._shape = shape
        self._cursor = cursor
        self._pool = pool
        self._requested: deque[Cursor] = deque()
        """The cursors after the batches that the workers read."""

    def next(self) -> tuple[AnyBatch, Cursor]:
        if self._pool is None:
            ids = self._ids()
            batch = self._shape.read(self._samples, ids)
            self._cursor = self._after()
            return batch, self._cursor
        while not self._pool.is_full:
            self._pool.request(self._ids())
            self._cursor = self._after()
            self._requested.append(self._cursor)
        return self._pool.receive(), self._requested.popleft()

    def _ids(self) -> np.ndarray:
        """Return the samples of the global batch at the cursor."""
        return batch_ids(self._cursor, self._order, self._shape.global_batch_size)

    def _after(self) -> Cursor:
        return Cursor(self._cursor.samples + self._shape.global_batch_size)


class _Prefetcher:
    """One daemon thread that keeps a bounded queue of batches filled."""

    def __init__(self, source: _Source, num_batches: int) -> None:
        self._source = source
        self._queue: queue.Queue[tuple[AnyBatch, Cursor] | Exception] = queue.Queue(maxsize=num_batches)
        self._closing = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._fill, name="kempnerforge-data", daemon=True)
        self._thread.start()

    def next(self) -> tuple[AnyBatch, Cursor]:
        if self._failure is None:
            item = self._queue.get()
            if not isinstance(item, Exception):
                return item
            self._failure = item
        raise self._failure

    def close(self) -> None:
        self._closing.set()
        # The thread puts at most one more item before it sees the event, and the queue has room for
        # it.
        while not self._queue.empty():
            self._queue.get()
        self._thread.join()

    def _fill(self) -> None:
        while not self._closing.is_set():
            try:
                item = self._source.next()
            except Exception as error:  # noqa: BLE001  raised in the consumer's thread
                self._queue.put(error)
                return
            self._queue.put(item)


def eval_batches(
    samples: Samples | MapSamples,
    *,
    num_batches: int,
    global_batch_size: int,
    batch_size: int,
    dp_rank: int = 0,
    dp_size: int = 1,
) -> Iterator[AnyBatch]:
    """Yield the first ``num_batches * global_batch_size`` samples in order, the same at every evaluation.

    A smaller split is repeated from its first sample. Each rank gets its part of every batch. The
    union over the ranks does not depend on ``dp_size``.

    Raises ValueError if ``global_batch_size`` is not a multiple of ``batch_size * dp_size``.
    """
    shape = BatchShape(global_batch_size, batch_size, dp_rank, dp_size)
    ids = np.arange(num_batches * global_batch_size, dtype=np.int64) % samples.num_samples
    return (shape.read(samples, part) for part in ids.reshape(num_batches, global_batch_size))
