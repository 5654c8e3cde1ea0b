"""One optimizer step of a model that is divided into pipeline stages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor.parallel import loss_parallel

from kempnerforge.data.rows import IGNORED
from kempnerforge.parallel.pipeline import Pipeline
from kempnerforge.train.batch_loss import BatchLoss
from kempnerforge.train.micro_batch import Batch, MicroBatch, all_rows
from kempnerforge.train.optimizer import Optimizers
from kempnerforge.train.step import TrainStepBase


class PipelineStep(TrainStepBase):
    """A step in which one schedule processes all sequences of a rank, in microbatches.

    There is no gradient accumulation: a fuller pipeline has less idle time. The stages' weights and
    gradients are unsharded from the first microbatch to the last. Then gradients are reduced and
    sharded.
    """

    def __init__(self, pipeline: Pipeline, optimizer: Optimizers, **options: Any) -> None:
        super().__init__(pipeline.parts, optimizer, **options)
        self._pipeline = pipeline
        self._schedule = pipeline.training_schedule(self._share_of_loss)
        self._rows: MicroBatch | None = None
        self._num_done = 0
        self._batch_loss: BatchLoss | None = None

    def forward_backward(self, batch: Batch) -> Tensor:
        """Compute the gradients of all microbatches. Return the mean loss of the global batch, fp32 [].

        Collective: all ranks, in the same order. Blocks: not for the device.
        """
        rows = all_rows(batch, self._device, with_sources=self._num_sources > 0)
        tokens, targets, options = self._inputs(rows)
        self._rows, self._num_done = rows, 0
        self._batch_loss = batch_loss = self._begin(batch, [] if targets is None else [targets])
        if self._pipeline.has_last:
            options |= self._loss_function.forward_options
        with loss_parallel():
            self._schedule.step(*tokens, target=targets, return_outputs=False, **options)
        self._rows = self._batch_loss = None
        return self._end(batch_loss)

    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Return the mean loss over the targets of ``batches`` that count, in the numerics of training.

        Every rank must pass the same number of batches, at least one, of the size of training
        batches. NaN if nothing counts.

        Collective: all ranks, in the same order. Blocks: for the device, once.
        """
        loss = torch.zeros((), dtype=torch.float64, device=self._device)
        num_targets = torch.zeros_like(loss)
        loss_function = self._loss_function.without_z_loss()
        schedule = self._pipeline.forward_schedule(
            lambda part, x, targets, document_ids=None: (
                loss_function(part, MicroBatch(x, targets, document_ids)).reported
            )
        )
        for part in self._pipeline.parts:
            part.eval()
        with self._evaluation_weights(), torch.no_grad(), loss_parallel():
            for batch in batches:
                self._check_loss(batch)
                tokens, targets, options = self._inputs(all_rows(batch, self._device))
                if targets is None:
                    schedule.step(*tokens, **options)
                    continue
                losses = schedule.step(*tokens, targets=targets, **options)
                assert losses is not None
                loss += losses.double().sum()
                num_targets += targets.ne(IGNORED).sum()
        for part in self._pipeline.parts:
            part.train()
            # A forward without a backward leaves the weights unsharded.
            for module in part.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        return self._mean(loss, num_targets)

    def _inputs(self, rows: MicroBatch) -> tuple[list[Tensor], Tensor | None, dict[str, Any]]:
        """Return the tokens for a first stage, the targets for a last one, and options for all stages."""
        tokens = [rows.inputs_BT] if self._pipeline.has_first else []
        return tokens, rows.targets_BT if self._pipeline.has_last else None, rows.forward_options

    def _share_of_loss(self, output: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the contribution of a microbatch to the mean loss of the global batch, and keep it.

        Microbatches come in the order of their rows: torch finds their losses again by their number.
        """
        assert self._rows is not None
        assert self._batch_loss is not None
        sources, end = self._rows.sources, self._num_done + len(targets_BT)
        if sources is not None:
            sources = sources[self._num_done : end]
        self._num_done = end
        part = self._loss_function.of_output(output, targets_BT, sources) / self._batch_loss.divisor
        self._batch_loss.add(part)
        return part.total
