"""The rows that go through the model at once. Shape suffixes: A micro-batches, B rows, T tokens."""

from __future__ import annotations

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
        """The token that follows each input, int64 [A, B, T] on the CPU."""
        ...

    @property
    def num_tokens(self) -> int:
        """Tokens of the **global** batch."""
        ...

    @property
    def document_ids_ABT(self) -> Tensor | None:
        """The document of each input, int32 [A, B, T] on the CPU. None without a document mask."""
        ...


@dataclass(frozen=True)
class MicroBatch:
    """Rows on the device of the model."""

    inputs_BT: Tensor
    """Token ids, int64; in a later pipeline stage the output of the stage before, [B, T, ...]."""
    targets_BT: Tensor
    """The token that follows each input, int64."""
    document_ids_BT: Tensor | None = None
    """The document of each input, int32. None without a document mask."""

    @property
    def forward_options(self) -> dict[str, Any]:
        """Keyword arguments for the forward pass of the model, and of all its pipeline stages."""
        return {} if self.document_ids_BT is None else {"document_ids": self.document_ids_BT}


def micro_batches(batch: Batch, device: torch.device) -> list[MicroBatch]:
    """Move ``batch`` to ``device``. Return its micro-batches, in order."""
    inputs_ABT = batch.inputs_ABT.to(device, non_blocking=True)
    targets_ABT = batch.targets_ABT.to(device, non_blocking=True)
    documents = [None] * len(inputs_ABT)
    if batch.document_ids_ABT is not None:
        documents = list(batch.document_ids_ABT.to(device, non_blocking=True))
    rows = zip(inputs_ABT, targets_ABT, documents, strict=True)
    return [MicroBatch(inputs, targets, ids) for inputs, targets, ids in rows]


def all_rows(batch: Batch, device: torch.device) -> MicroBatch:
    """Move ``batch`` to ``device``. Return the rows of all its micro-batches together, in order."""
    ids = batch.document_ids_ABT
    return MicroBatch(
        batch.inputs_ABT.flatten(0, 1).to(device, non_blocking=True),
        batch.targets_ABT.flatten(0, 1).to(device, non_blocking=True),
        None if ids is None else ids.flatten(0, 1).to(device, non_blocking=True),
    )
