"""The loss of a global batch, of which every rank computes a part.

Shape suffixes: R rows of this rank, S sources of a mixture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from kempnerforge.data.rows import IGNORED
from kempnerforge.train.loss import LossSums
from kempnerforge.train.micro_batch import Batch


@dataclass(frozen=True)
class BatchTotals:
    """Numbers of a global batch, on the device. They have the same bits on every rank."""

    loss: Tensor
    """The mean loss without the z-loss, []. NaN if nothing counts."""
    z_loss: Tensor | None = None
    """The mean z-loss, []."""
    num_items: Tensor | None = None
    """What the means are over, []. None if the batch says it."""
    source_losses: Tensor | None = None
    """The mean loss over the targets of each source that count, [S]. NaN where there are none."""


@dataclass(frozen=True)
class Ranks:
    """The ranks that compute a loss together."""

    device: torch.device
    group: dist.ProcessGroup
    copies: int = 1
    """Number of ranks that compute each loss (tensor parallelism)."""

    def sum(self, values: Tensor) -> Tensor:
        """Add up ``values`` of all ranks in place. Return the sum, of the copies only one.

        Collective: all ranks. Integers remain integers.
        """
        dist.all_reduce(values, group=self.group)
        return values / self.copies if values.is_floating_point() else values // self.copies


class BatchLoss:
    """The sums over the micro-batches of a global batch.

    ``targets`` are those [B, T] of this rank's micro-batches, none on ranks that compute no loss.
    ``num_sources`` above 0 asks for the loss of each source. Only some sources may have targets that
    do not count, so that only some ranks see them: then the ranks always count together.

    Collective with sources, or if the batch does not say how many of its targets count: all ranks.
    Does not block.
    """

    def __init__(
        self, batch: Batch, targets: Sequence[Tensor], ranks: Ranks, *, has_z_loss: bool, num_sources: int
    ) -> None:
        self._batch = batch
        self._ranks = ranks
        self._num_sources = num_sources
        self._sums = torch.zeros((2,) if has_z_loss else (), dtype=torch.float32, device=ranks.device)
        self._row_losses: list[Tensor] = []
        self._counts: list[Tensor] = []
        self._num_items: Tensor | None = None
        self.divisor: int | Tensor
        """What the loss of a micro-batch is divided by: the number of targets that count, at least 1."""
        if batch.num_tokens is None or num_sources:
            self._counts = [targets_BT.ne(IGNORED).sum(1) for targets_BT in targets]
            self._num_items = ranks.sum(self._joined(self._counts, torch.int64).sum())
            self.divisor = self._num_items.clamp(min=1)
        else:
            self.divisor = batch.num_tokens

    def add(self, part: LossSums) -> None:
        """Add a part of the loss, which is divided by ``divisor``. Parts come in the order of ``targets``."""
        self._sums += part.reported
        if part.rows is not None:
            self._row_losses.append(part.rows)

    def totals(self) -> BatchTotals:
        """Return the totals of all ranks. Collective: all ranks. Does not block."""
        sums, source_losses = self._sums, None
        if self._num_sources:
            by_source = self._by_source()
            sums = self._ranks.sum(torch.cat([sums.reshape(-1), by_source.flatten()]))
            losses_S, counts_S = sums[-by_source.numel() :].chunk(2)
            sums, source_losses = sums[: -by_source.numel()].view_as(self._sums), losses_S / counts_S
        else:
            sums = self._ranks.sum(sums)
        loss, z_loss = (sums, None) if sums.dim() == 0 else sums.unbind()
        if self._num_items is not None:
            loss = torch.where(self._num_items > 0, loss, torch.nan)
        return BatchTotals(loss, z_loss, self._num_items, source_losses)

    def _by_source(self) -> Tensor:
        """Return the summed loss and the number of counted targets of each source, [2, S], on this rank."""
        losses_R = self._joined(self._row_losses, torch.float32)
        counts_R = self._joined(self._counts, torch.float32)
        sources_R = losses_R
        if self._counts:
            assert self._batch.sources_AB is not None
            sources_R = self._batch.sources_AB.flatten().to(self._ranks.device, non_blocking=True)
        is_of_source_SR = sources_R == torch.arange(self._num_sources, device=self._ranks.device)[:, None]
        return torch.where(is_of_source_SR, torch.stack([losses_R, counts_R])[:, None], 0).sum(2)

    def _joined(self, rows: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return the values of all rows of this rank, [R]."""
        nothing = torch.zeros(0, dtype=dtype, device=self._ranks.device)
        return torch.cat([nothing, *(values.to(dtype) for values in rows)])
