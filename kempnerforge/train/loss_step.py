"""One optimizer step of a model that computes its own loss: ``loss(batch) -> (summed loss, items)``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from kempnerforge.errors import PluginError
from kempnerforge.train.batch_loss import BatchTotals
from kempnerforge.train.loss import described
from kempnerforge.train.micro_batch import Batch
from kempnerforge.train.optimizer import Optimizers
from kempnerforge.train.step import TrainStepBase, local_tensors

Fields = Mapping[str, Tensor]


class LossStep(TrainStepBase):
    """A step of a model that every rank runs completely and that computes its own loss.

    Loss and gradients are divided by the items of the whole global batch, which are known only after
    the last forward. So the backward is scaled by a constant, 1 / samples of the global batch, and
    the gradients are rescaled once.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizers, **options: Any) -> None:
        super().__init__([model], optimizer, **options)
        assert isinstance(model, FSDPModule)
        self._model = model

    def forward_backward(self, batch: Any) -> Tensor:
        """Sum the gradients of all micro-batches. Return the mean loss of the global batch, fp32 [].

        It is not finite for a global batch without items, so that ``update`` skips the step.

        Collective: all ranks, in the same order. Blocks: not for the device.
        """
        totals = torch.zeros(2, dtype=torch.float64, device=self._device)
        micro_batches = _micro_batches(batch)
        for i, fields in enumerate(micro_batches):
            self._model.set_requires_all_reduce(i == len(micro_batches) - 1)
            loss, num_items = self._loss_of(fields)
            if not loss.requires_grad:
                raise self._unusable("a loss that does not depend on the parameters")
            (loss / batch.num_samples).backward()
            totals[0] += loss.detach()
            totals[1] += num_items
        dist.all_reduce(totals, group=self._group)
        summed, num_items = (totals / self._loss_copies).unbind()
        self._totals = BatchTotals(summed / num_items, num_items=num_items)
        grads = local_tensors(param.grad for param in self._params if param.grad is not None)
        if grads:
            scale = batch.num_samples / num_items
            torch._foreach_mul_(grads, scale.to(grads[0].dtype))  # pyright: ignore[reportPrivateImportUsage]
        return self._totals.loss.float()

    def evaluate(self, batches: Iterable[Any]) -> float:
        """Return the mean loss over all items of ``batches``, on all ranks; nan if there are none.

        Every rank must pass the same number of micro-batches, at least one.

        Collective: all ranks, in the same order. Blocks: for the device, once.
        """
        totals = torch.zeros(2, dtype=torch.float64, device=self._device)
        self._model.eval()
        with self._evaluation_weights(), torch.no_grad():
            for batch in batches:
                for fields in _micro_batches(batch):
                    loss, num_items = self._loss_of(fields)
                    totals[0] += loss
                    totals[1] += num_items
        self._model.train()
        self._model.reshard()  # see LocalStep.evaluate
        return self._mean(*totals)

    def _loss_of(self, fields: Fields) -> tuple[Tensor, Tensor | int]:
        """Return the summed loss of a micro-batch, [], and its number of items. Raises PluginError."""
        on_device = {name: value.to(self._device, non_blocking=True) for name, value in fields.items()}
        result: Any = self._model.loss(on_device)  # type: ignore[operator]
        if not isinstance(result, tuple | list) or len(result) != 2:
            raise self._unusable(f"a {type(result).__name__}")
        loss, num_items = result
        if not isinstance(loss, Tensor) or loss.dim():
            raise self._unusable(f"{described(loss)} as the loss")
        is_count = isinstance(num_items, Tensor) and not num_items.dim()
        if not is_count and type(num_items) is not int:
            raise self._unusable(f"{described(num_items)} as the number of items")
        return loss, num_items

    def _unusable(self, what: str) -> PluginError:
        name = type(self._model).__name__.removeprefix("FSDP")
        return PluginError(
            f"{name}.loss(batch) returned {what}; it returns the summed loss, a tensor [], and the number of "
            "items, an int or a tensor []"
        )


def _micro_batches(batch: Any) -> list[Fields]:
    """Return the micro-batches of a batch, on the CPU.

    Those of tokens have ``tokens`` and ``targets``, and with a document mask ``document_ids``.
    """
    if hasattr(batch, "micro_batches"):
        return batch.micro_batches
    tokens: Batch = batch
    fields = {"tokens": tokens.inputs_ABT, "targets": tokens.targets_ABT}
    if tokens.document_ids_ABT is not None:
        fields["document_ids"] = tokens.document_ids_ABT
    return [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)]
