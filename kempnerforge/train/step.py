"""One optimizer step: forward and backward over the micro-batches, then the update.

Shape suffixes: A micro-batches of gradient accumulation, B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import loss_parallel

from kempnerforge.data.rows import IGNORED
from kempnerforge.train.batch_loss import BatchLoss, BatchTotals, Ranks
from kempnerforge.train.loss import Loss
from kempnerforge.train.micro_batch import Batch, micro_batches
from kempnerforge.train.optimizer import Optimizers, each, is_schedule_free


@dataclass(frozen=True)
class UpdateResult:
    """The result of an update. It is the same on every rank."""

    grad_norm: float
    """Norm of all gradients together, before clipping."""
    loss: float
    """Mean loss of the global batch, without the z-loss."""
    skipped: bool
    """Whether loss or gradients were not finite, so that weights and optimizer state did not change."""
    z_loss: float = 0.0
    """Mean z-loss of the global batch, 0 if it is off."""
    num_items: int | None = None
    """Targets of the global batch that count, or the items that ``loss(batch)`` of the model counted.
    None if all targets count."""
    source_losses: tuple[float, ...] | None = None
    """Mean loss of each source in the global batch, NaN if it has no targets that count. None if the
    step was not told of sources."""

    def count(self, batch: Any) -> int:
        """Return the targets of the global batch that count, or the items of the model's own loss."""
        return batch.num_tokens if self.num_items is None else self.num_items


class TrainStep(Protocol):
    """The interface of a training step, for any distribution of the model over the ranks."""

    def forward_backward(self, batch: Any) -> Tensor:
        """Compute the gradients of ``batch``. Return the mean loss of the global batch, fp32 [].

        The loss is on the device. ``batch`` is a ``Batch``, or what ``LossStep`` takes.
        """
        ...

    def update(self, lr: float) -> UpdateResult:
        """Apply the gradients with learning rate ``lr``, or skip the step. Drop the gradients."""
        ...

    @property
    def evaluates_other_weights(self) -> bool:
        """Whether ``evaluate`` changes the weights and restores them (schedule-free optimizers)."""
        ...

    def evaluate(self, batches: Iterable[Any]) -> float:
        """Return the mean loss over the targets of ``batches`` that count, on all ranks; NaN without any."""
        ...

    @property
    def num_evaluated(self) -> int:
        """Targets that counted in the last ``evaluate``, on all ranks, or the items of the model's loss."""
        ...


class TrainStepBase:
    """The common part of all training steps: loss, gradient norm, clipping and the optimizer.

    ``parts`` are this rank's parts of the model. ``group`` has all ranks of the run.
    ``loss_copies`` ranks compute each loss (tensor parallelism). Without ``loss``, it is the
    cross-entropy. With ``num_sources``, updates report the loss of each source, of which batches tell
    the number. No random numbers are used.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        optimizer: Optimizers,
        *,
        device: torch.device,
        group: dist.ProcessGroup,
        grad_clip_norm: float,
        loss_copies: int = 1,
        loss: Loss | None = None,
        num_sources: int = 0,
    ) -> None:
        if not all(isinstance(part, FSDPModule) for part in parts):
            raise TypeError(f"{type(self).__name__} takes a model that parallelize() has sharded")
        self._params = [param for part in parts for param in part.parameters() if param.requires_grad]
        self._optimizers = list(each(optimizer))
        self._device = device
        self._group = group
        self._grad_clip_norm = grad_clip_norm
        self._loss_copies = loss_copies
        self._ranks = Ranks(device, group, loss_copies)
        self._loss_function = loss or Loss()
        self._num_sources = num_sources
        self._totals: BatchTotals | None = None
        self._num_evaluated = 0

    def update(self, lr: float) -> UpdateResult:
        """Clip and apply the gradients of the last ``forward_backward``, or skip the step.

        A step whose loss or gradient norm is not finite, or whose batch has no targets that count,
        is skipped: weights, moments and step counters do not change. All ranks decide alike without
        communication: these numbers are results of an all-reduce over all ranks, which have the same
        bits on every rank.

        Collective: all ranks, in the same order. Blocks: for the device, once.
        Mutation: weights and optimizer state, unless skipped; gradients are dropped either way.
        """
        totals, self._totals = self._totals, None
        if totals is None:
            raise RuntimeError("update() without a forward_backward() before it")
        grads = [param.grad for param in self._params if param.grad is not None]
        norm = global_norm(grads, group=self._group, device=self._device, tp=self._loss_copies)
        given = (totals.loss, norm, totals.z_loss, totals.num_items, totals.source_losses)
        numbers = torch.cat([value.double().reshape(-1) for value in given if value is not None]).tolist()
        loss, grad_norm, *others = numbers
        z_loss = 0.0 if totals.z_loss is None else others.pop(0)
        num_items = None if totals.num_items is None else int(others.pop(0))
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite:
            if 0 < self._grad_clip_norm < grad_norm and (local := local_tensors(grads)):
                scale = self._grad_clip_norm / grad_norm
                torch._foreach_mul_(local, scale)  # pyright: ignore[reportPrivateImportUsage]
            for optimizer in self._optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr * group.get("lr_scale", 1.0)
                optimizer.step()
        for param in self._params:
            param.grad = None
        return UpdateResult(
            grad_norm=grad_norm,
            loss=loss,
            skipped=not finite,
            z_loss=z_loss,
            num_items=num_items,
            source_losses=None if totals.source_losses is None else tuple(others),
        )

    @property
    def num_evaluated(self) -> int:
        """Targets that counted in the last ``evaluate``, on all ranks, or the items of the model's loss."""
        return self._num_evaluated

    @property
    def evaluates_other_weights(self) -> bool:
        """Whether ``evaluate`` changes the weights and restores them (schedule-free optimizers)."""
        return any(is_schedule_free(optimizer) for optimizer in self._optimizers)

    @contextmanager
    def _evaluation_weights(self) -> Iterator[None]:
        """Put schedule-free optimizers into their evaluation weights, and back to the same bits.

        Their own way back is exact up to rounding only, and a run must not depend on how often it
        is validated. So a copy of this rank's weights is kept, where gradients were before.
        """
        changing = [optimizer for optimizer in self._optimizers if is_schedule_free(optimizer)]
        if not changing:
            yield
            return
        weights = local_tensors(param.detach() for param in self._params)
        copies = [weight.clone() for weight in weights]
        for optimizer in changing:
            optimizer.eval()
        try:
            yield
        finally:
            for optimizer in changing:
                optimizer.train()
            for weight, copy in zip(weights, copies, strict=True):
                weight.copy_(copy)

    def _begin(self, batch: Batch, targets: Sequence[Tensor]) -> BatchLoss:
        """Begin the loss of ``batch``, for the micro-batches of this rank with ``targets`` [B, T].

        Collective: all ranks. Raises ConfigError on all ranks for a loss that is not a sum, or cannot
        ignore targets.
        """
        self._check_loss(batch)
        has_z_loss = self._loss_function.z_loss > 0
        return BatchLoss(batch, targets, self._ranks, has_z_loss=has_z_loss, num_sources=self._num_sources)

    def _check_loss(self, batch: Batch) -> None:
        with_ignored = batch.num_tokens is None or self._num_sources > 0  # all ranks alike, as in BatchLoss
        self._loss_function.check_function(with_ignored=with_ignored)

    def _end(self, batch_loss: BatchLoss) -> Tensor:
        """Keep the totals for ``update``. Return the mean loss of the global batch.

        Collective: all ranks.
        """
        self._totals = batch_loss.totals()
        return self._totals.loss

    def _mean(self, loss: Tensor, num_targets: Tensor) -> float:
        """Return the mean loss over ``num_targets`` of all ranks. Ranks that computed none pass 0."""
        totals = torch.stack([loss, num_targets])
        dist.all_reduce(totals, group=self._group)
        summed, count = totals.tolist()
        self._num_evaluated = int(count) // self._loss_copies
        return summed / count if count else math.nan


class LocalStep(TrainStepBase):
    """A step of a model that every rank runs completely (FSDP2, HSDP, tensor parallelism)."""

    def __init__(self, model: nn.Module, optimizer: Optimizers, **options: Any) -> None:
        super().__init__([model], optimizer, **options)
        assert isinstance(model, FSDPModule)
        self._model = model

    def forward_backward(self, batch: Batch) -> Tensor:
        """Sum the gradients of all micro-batches. Return the mean loss of the global batch, fp32 [].

        The gradients of every micro-batch are reduce-scattered into this rank's shards immediately.
        Kept unsharded until the last micro-batch, they would need the memory of the whole model as
        soon as a run resumes on fewer ranks and has to accumulate. Only the reduction over HSDP's
        replicas waits for the last micro-batch.

        Collective: all ranks, in the same order. Blocks: not for the device.
        """
        rows = micro_batches(batch, self._device, with_sources=self._num_sources > 0)
        batch_loss = self._begin(batch, [micro_batch.targets_BT for micro_batch in rows])
        for i, micro_batch in enumerate(rows):
            self._model.set_requires_all_reduce(i == len(rows) - 1)
            with loss_parallel():
                part = self._loss_function(self._model, micro_batch) / batch_loss.divisor
                part.total.backward()
            batch_loss.add(part)
        return self._end(batch_loss)

    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Return the mean loss over the targets of ``batches`` that count, in the numerics of training.

        Every rank must pass the same number of micro-batches, at least one. NaN if nothing counts.

        Collective: all ranks, in the same order. Blocks: for the device, once.
        """
        loss = torch.zeros((), dtype=torch.float64, device=self._device)
        num_targets = torch.zeros_like(loss)
        loss_function = self._loss_function.without_z_loss()
        self._model.eval()
        with self._evaluation_weights(), torch.no_grad(), loss_parallel():
            for batch in batches:
                self._check_loss(batch)
                for micro_batch in micro_batches(batch, self._device):
                    loss += loss_function(self._model, micro_batch).reported
                    num_targets += micro_batch.targets_BT.ne(IGNORED).sum()
        self._model.train()
        # FSDP leaves the root's parameters unsharded after a forward. Only a backward reshards
        # them.
        self._model.reshard()
        return self._mean(loss, num_targets)


def local_tensors(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return this rank's part of every tensor, sharing its memory. Parts without elements are omitted."""
    parts = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return [part for part in parts if part.numel()]


def global_norm(
    tensors: Iterable[Tensor], *, group: dist.ProcessGroup, device: torch.device, tp: int = 1
) -> Tensor:
    """Return the 2-norm of all ``tensors`` together, with the shards of all ranks.

    The result is fp64 [] with the same bits on every rank. ``group`` has the ranks of every stage's
    mesh. One reduction sums the squares of each rank's shards, divided by the number of ranks with
    the same shard. ``tp`` is the number of tensor-parallel ranks.

    Collective: all ranks of ``group``.
    """
    by_copies: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        by_copies.setdefault(_num_copies(tensor, group, tp), []).append(tensor)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for copies, alike in by_copies.items():
        if parts := local_tensors(alike):
            total += torch.nn.utils.get_total_norm(parts).double().square() / copies
    dist.all_reduce(total, group=group)
    return total.sqrt()


def _num_copies(tensor: Tensor, group: dist.ProcessGroup, tp: int) -> int:
    if not isinstance(tensor, DTensor):
        return group.size()
    mesh_dims = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    copies = math.prod(size for size, placement in mesh_dims if isinstance(placement, Replicate))
    # A parameter that the plan of a user's model leaves out is whole on every tensor-parallel rank.
    is_planned = "tp" in (tensor.device_mesh.mesh_dim_names or ())
    return copies if is_planned else copies * tp
