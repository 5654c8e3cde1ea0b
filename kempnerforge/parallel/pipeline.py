"""Pipeline parallelism: the stages that a rank holds, and the schedule that microbatches go through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from kempnerforge.model.llama import Llama

Schedule = Schedule1F1B | ScheduleGPipe | ScheduleInterleaved1F1B
LossFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Pipeline:
    """One rank's place in a pipeline and what flows through it."""

    parts: Sequence[Llama]
    """The stages that this rank holds, the first first. They keep the whole model's parameter names."""
    stage_numbers: Sequence[int]
    """Which of all stages they are."""
    num_stages: int
    schedule: str
    """``[distributed] pp_schedule``."""
    microbatches: int
    """Microbatches that each rank's sequences of an optimizer step make."""
    microbatch_size: int
    """Sequences in each of them."""
    seq_len: int
    dtype: torch.dtype
    """Of what stages hand to each other."""
    device: torch.device
    group: dist.ProcessGroup
    """The ranks of this pipeline, in the order of their first stages."""

    @property
    def has_first(self) -> bool:
        """Whether this rank feeds the tokens in."""
        return self.stage_numbers[0] == 0

    @property
    def has_last(self) -> bool:
        """Whether this rank computes the loss."""
        return self.stage_numbers[-1] == self.num_stages - 1

    def training_schedule(self, loss: LossFunction) -> Schedule:
        """Forward and backward of all microbatches; ``loss`` gets logits and targets of one of them.

        Gradients are the plain sum over microbatches. Collective with the first ``step``.
        """
        options: dict[str, Any] = {"n_microbatches": self.microbatches, "loss_fn": loss, "scale_grads": False}
        stages = self._stages(self.parts)
        if self.schedule == "interleaved_1f1b":
            return ScheduleInterleaved1F1B(stages, **options)
        [stage] = stages
        return (Schedule1F1B if self.schedule == "1f1b" else ScheduleGPipe)(stage, **options)

    def forward_schedule(self, loss: LossFunction) -> Schedule:
        """Forward only, of as many microbatches, under ``no_grad``.

        ``step(tokens, targets=...)`` gives the rank with the last stage the losses, [microbatches]: logits
        are dropped as soon as their loss is known. The buffers of a schedule go when it goes.
        """
        stages = self._stages([_ForwardOnly(part, loss) for part in self.parts])
        if len(stages) > 1:
            return ScheduleInterleaved1F1B(stages, self.microbatches)
        return ScheduleGPipe(stages[0], self.microbatches)

    def _stages(self, modules: Sequence[nn.Module]) -> list[Any]:
        return [
            PipelineStage(
                module,
                number,
                self.num_stages,
                self.device,
                # Told, so that torch need not run every stage once to find out.
                input_args=self._example(0, number),
                output_args=self._example(1, number),
                group=self.group,
            )
            for module, number in zip(modules, self.stage_numbers, strict=True)
        ]

    def _example(self, side: int, number: int) -> Tensor:
        """What a stage takes (``side`` 0) or gives (1), without memory."""
        config, shards = self.parts[0].config, self.parts[0].sequence_shards
        border = number + side
        if border == 0:
            return torch.empty(self.microbatch_size, self.seq_len, dtype=torch.int64, device="meta")
        shape = (self.microbatch_size, self.seq_len // shards, config.dim)
        if border == self.num_stages:
            shape = (self.microbatch_size, self.seq_len, config.vocab_size)
        return torch.empty(shape, dtype=self.dtype, device="meta", requires_grad=True)


class _ForwardOnly(nn.Module):
    """A stage for validation: the last one gives its loss, [1], and not its logits."""

    def __init__(self, part: Llama, loss: LossFunction) -> None:
        super().__init__()
        self.part = part
        self.loss = loss

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """Tokens or what the stage before gave; ``targets`` reach only the rank that has the last stage."""
        out = self.part(x)
        if self.part.norm is None:
            return out
        assert targets is not None
        return self.loss(out, targets)[None]
