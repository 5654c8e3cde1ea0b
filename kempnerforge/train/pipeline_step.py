"""One optimizer step of a model that is divided into pipeline stages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor.parallel import loss_parallel

from kempnerforge.parallel.pipeline import Pipeline
from kempnerforge.train.optimizer import Optimizers
from kempnerforge.train.step import Batch, TrainStepBase


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
        self._num_tokens = 0
        self._parts: list[Tensor] = []

    def forward_backward(self, batch: Batch) -> Tensor:
        """Compute the gradients of all microbatches. Return the mean loss of the global batch, fp32 [].

        Collective: all ranks, in the same order. Blocks: not for the device.
        """
        self._num_tokens = batch.num_tokens
        self._parts = []
        tokens, targets = self._inputs(batch)
        options = self._loss_function.forward_options if self._pipeline.has_last else {}
        with loss_parallel():
            self._schedule.step(*tokens, target=targets, return_outputs=False, **options)
        return self._total(self._parts)

    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Return the mean loss over all tokens of ``batches``, on all ranks, in the numerics of training.

        Every rank must pass the same number of batches, at least one, of the size of training
        batches.

        Collective: all ranks, in the same order. Blocks: for the device, once.
        """
        loss = torch.zeros((), dtype=torch.float64, device=self._device)
        num_tokens = 0
        loss_function = self._loss_function.without_z_loss()
        schedule = self._pipeline.forward_schedule(
            lambda part, x, targets: loss_function(part, x, targets).reported
        )
        for part in self._pipeline.parts:
            part.eval()
        with self._evaluation_weights(), torch.no_grad(), loss_parallel():
            for batch in batches:
                tokens, targets = self._inputs(batch)
                if targets is None:
                    schedule.step(*tokens)
                    continue
                losses = schedule.step(*tokens, targets=targets)
                assert losses is not None
                loss += losses.double().sum()
                num_tokens += targets.numel()
        for part in self._pipeline.parts:
            part.train()
            # A forward without a backward leaves the weights unsharded.
            for module in part.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        return self._mean(loss, num_tokens)

    def _inputs(self, batch: Batch) -> tuple[list[Tensor], Tensor | None]:
        """Return the tokens for a first stage and the targets for a last one, [B, T] of this rank."""
        tokens, targets = [], None
        if self._pipeline.has_first:
            tokens = [batch.inputs_ABT.flatten(0, 1).to(self._device, non_blocking=True)]
        if self._pipeline.has_last:
            targets = batch.targets_ABT.flatten(0, 1).to(self._device, non_blocking=True)
        return tokens, targets

    def _share_of_loss(self, output: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the contribution of a microbatch to the mean loss of the global batch, and keep it."""
        part = self._loss_function.of_output(output, targets_BT) / self._num_tokens
        self._parts.append(part.reported)
        return part.total
