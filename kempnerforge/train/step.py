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

from kempnerforge.train.loss import Loss
from kempnerforge.train.optimizer import Optimizers, each, is_schedule_free


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
    """Items of the global batch that ``loss(batch)`` of the model counted; None for tokens."""
    source_losses: tuple[float, ...] | None = None
    """Mean loss of each source of a mixture, NaN for one that the batch has no sample of."""

    def count(self, batch: Any) -> int:
        """Return the tokens of the global batch, or the items of the model's own loss."""
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
        """Return the mean loss over all tokens of ``batches``, on all ranks."""
        ...


class TrainStepBase:
    """The common part of all training steps: loss, gradient norm, clipping and the optimizer.

    ``parts`` are this rank's parts of the model. ``group`` has all ranks of the run.
    ``loss_copies`` ranks compute each loss (tensor parallelism). Without ``loss``, it is the
    cross-entropy. No random numbers are used.
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
    ) -> None:
        if not all(isinstance(part, FSDPModule) for part in parts):
            raise TypeError(f"{type(self).__name__} takes a model that parallelize() has sharded")
        self._params = [param for part in parts for param in part.parameters()]
        self._optimizers = list(each(optimizer))
        self._device = device
        self._group = group
        self._grad_clip_norm = grad_clip_norm
        self._loss_copies = loss_copies
        self._loss_function = loss or Loss()
        self._loss: Tensor | None = None
        self._z_loss: Tensor | None = None

    def update(self, lr: float) -> UpdateResult:
        """Clip and apply the gradients of the last ``forward_backward``, or skip the step.

        A step whose loss or gradient norm is not finite is skipped: weights, moments and step
        counters do not change. All ranks decide alike without communication: both numbers are
        results of an all-reduce over all ranks, which have the same bits on every rank.

        Collective: all ranks, in the same order. Blocks: for the device, once.
        Mutation: weights and optimizer state, unless skipped; gradients are dropped either way.
        """
        if self._loss is None:
            raise RuntimeError("update() without a forward_backward() before it")
        grads = [param.grad for param in self._params if param.grad is not None]
        norm = global_norm(grads, group=self._group, device=self._device, tp=self._loss_copies)
        numbers = [self._loss.double(), norm] + ([] if self._z_loss is None else [self._z_loss.double()])
        loss, grad_norm, *z = torch.stack(numbers).tolist()
        self._loss = self._z_loss = None
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite:
            if 0 < self._grad_clip_norm < grad_norm:
                scale = self._grad_clip_norm / grad_norm
                torch._foreach_mul_(local_tensors(grads), scale)  # pyright: ignore[reportPrivateImportUsage]
            for optimizer in self._optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr * group.get("lr_scale", 1.0)
                optimizer.step()
        for param in self._params:
            param.grad = None
        return UpdateResult(grad_norm=grad_norm, loss=loss, skipped=not finite, z_loss=sum(z))

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

    def _total(self, parts: Iterable[Tensor]) -> Tensor:
        """Return the sum of all ranks' parts of the loss of the global batch, and keep it for ``update``.

        ``parts`` are this rank's, each as ``LossSums.reported``. The result has the same bits on
        every rank, also on those that computed no part.
        """
        has_z_loss = self._loss_function.z_loss > 0
        sums = torch.zeros((2,) if has_z_loss else (), dtype=torch.float32, device=self._device)
        for part in parts:
            sums += part
        dist.all_reduce(sums, group=self._group)
        sums = sums / self._loss_copies
        self._loss, self._z_loss = sums.unbind() if has_z_loss else (sums, None)
        return self._loss

    def _mean(self, loss: Tensor, num_tokens: int) -> float:
        """Return the mean loss over the tokens of all ranks. A rank that computed no ``loss`` passes 0."""
        totals = torch.stack([loss, torch.full_like(loss, num_tokens)])
        dist.all_reduce(totals, group=self._group)
        summed, count = totals.tolist()
        if count == 0:
            raise ValueError("nothing to evaluate on")
        return summed / count


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
        inputs_ABT = batch.inputs_ABT.to(self._device, non_blocking=True)
        targets_ABT = batch.targets_ABT.to(self._device, non_blocking=True)
        parts: list[Tensor] = []
        last = inputs_ABT.size(0) - 1
        for i, (inputs_BT, targets_BT) in enumerate(zip(inputs_ABT, targets_ABT, strict=True)):
            self._model.set_requires_all_reduce(i == last)
            with loss_parallel():
                part = self._loss_function(self._model, inputs_BT, targets_BT) / batch.num_tokens
                part.total.backward()
            parts.append(part.reported)
        return self._total(parts)

    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Return the mean loss over all tokens of ``batches``, on all ranks, in the numerics of training.

        Every rank must pass the same number of micro-batches, at least one.

        Collective: all ranks, in the same order. Blocks: for the device, once.
        """
        loss = torch.zeros((), dtype=torch.float64, device=self._device)
        num_tokens = 0
        loss_function = self._loss_function.without_z_loss()
        self._model.eval()
        with self._evaluation_weights(), torch.no_grad(), loss_parallel():
            for batch in batches:
                for inputs_BT, targets_BT in zip(batch.inputs_ABT, batch.targets_ABT, strict=True):
                    inputs_BT = inputs_BT.to(self._device, non_blocking=True)
                    targets_BT = targets_BT.to(self._device, non_blocking=True)
                    loss += loss_function(self._model, inputs_BT, targets_BT).reported
                    num_tokens += targets_BT.numel()
        self._model.train()
        # FSDP leaves the root's parameters unsharded after a forward. Only a backward reshards
        # them.
        self._model.reshard()
        return self._mean(loss, num_tokens)


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
