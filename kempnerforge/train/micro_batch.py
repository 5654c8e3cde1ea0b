"""The rows that go through the model at once. Shape suffixes: A micro-batches, B rows, T tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Batch(Protocol):
    """One rank's part of a global batch."""

    @property
    def inputs_ABT(self) -> Tensor:
        """Token ids, int64 [A, B, T] on the CPU."""
        ...

    @property
    def targets_ABT(self) -> Tensor:
        """The token that follows each input, int64 [A, B, T] on the CPU; ``IGNORED`` counts nothing."""
        ...

    @property
    def num_tokens(self) -> int | None:
        """Targets of the **global** batch. None if some do not count: only the ranks together know them.

        Without a mixture it is None for all batches of all ranks, or for none.
        """
        ...

    @property
    def document_ids_ABT(self) -> Tensor | None:
        """The document of each input, int32 [A, B, T] on the CPU. None without a document mask."""
        ...

    @property
    def sources_AB(self) -> Tensor | None:
        """The number of the source of each row, int64 on the CPU. None without a mixture."""
        ...


@dataclass(frozen=True)
class MicroBatch:
    """Rows on the device of the model."""

    inputs_BT: Tensor
    """Token ids, int64; in a later pipeline stage the output of the stage before, [B, T, ...]."""
    targets_BT: Tensor
    """The token that follows each input, int64; ``IGNORED`` counts nothing."""
    document_ids_BT: Tensor | None = None
    """The document of each input, int32. None without a document mask."""
    sources: Sequence[int] | None = None
    """The number of the source of each row, on the host. None if their losses are not asked for."""

    @property
    def forward_options(self) -> dict[str, Any]:
        """Keyword arguments for the forward pass of the model, and of all its pipeline stages."""
        return {} if self.document_ids_BT is None else {"document_ids": self.document_ids_BT}


def micro_batches(batch: Batch, device: torch.device, *, with_sources: bool = False) -> list[MicroBatch]:
    """Move ``batch`` to ``device``. Return its micro-batches, in order."""
    inputs_ABT = batch.inputs_ABT.to(device, non_blocking=True)
    targets_ABT = batch.targets_ABT.to(device, non_blocking=True)
    documents = sources = [None] * len(inputs_ABT)
    if batch.document_ids_ABT is not None:
        documents = batch.document_ids_ABT.to(device, non_blocking=True)
    if with_sources:
        sources = _sources(batch).tolist()
    return list(map(MicroBatch, inputs_ABT, targets_ABT, documents, sources))


def all_rows(batch: Batch, device: torch.device, *, with_sources: bool = False) -> MicroBatch:
    """Move ``batch`` to ``device``. Return the rows of all its micro-batches together, in order."""
    ids = batch.document_ids_ABT
    return MicroBatch(
        batch.inputs_ABT.flatten(0, 1).to(device, non_blocking=True),
        batch.targets_ABT.flatten(0, 1).to(device, non_blocking=True),
        None if ids is None else ids.flatten(0, 1).to(device, non_blocking=True),
        _sources(batch).flatten().tolist() if with_sources else None,
    )


def _sources(batch: Batch) -> Tensor:
    if batch.sources_AB is None:
        raise ValueError("the loss of each source needs batches with sources_AB")
    return batch.sources_AB
