"""Pipeline parallelism: the stages that a rank holds, and the schedule of the microbatches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from kempnerforge.errors import ConfigError, ConfigIssue

Schedule = Schedule1F1B | ScheduleGPipe | ScheduleInterleaved1F1B
LossFunction = Callable[[Tensor, Tensor], Tensor]
StageLoss = Callable[..., Tensor]


@dataclass(frozen=True)
class Pipeline:
    """The stages that one rank holds, and the microbatches that pass through them."""

    parts: Sequence[nn.Module]
    """The stages of this rank, in order. They keep the parameter names of the whole model."""
    stage_numbers: Sequence[int]
    """The numbers of these stages among all stages."""
    num_stages: int
    schedule: str
    """``[distributed] pp_schedule``."""
    microbatches: int
    """Microbatches per rank and optimizer step."""
    microbatch_size: int
    """Sequences per microbatch."""
    borders: Sequence[Tensor]
    """The input of the first stage, then the output of every stage, for one microbatch, on the meta
    device."""
    device: torch.device
    group: dist.ProcessGroup
    """The ranks of this pipeline, in the order of their first stages."""

    @property
    def has_first(self) -> bool:
        """Whether this rank holds the first stage, which takes the tokens."""
        return self.stage_numbers[0] == 0

    @property
    def has_last(self) -> bool:
        """Whether this rank holds the last stage, which computes the loss."""
        return self.stage_numbers[-1] == self.num_stages - 1

    def training_schedule(self, loss: LossFunction) -> Schedule:
        """Return a schedule for the forward and backward of all microbatches.

        ``loss`` gets the output of the last stage and the targets of one microbatch. Gradients are
        the plain sum over microbatches. The first ``step`` of the schedule is collective.
        """
        options: dict[str, Any] = {"n_microbatches": self.microbatches, "loss_fn": loss, "scale_grads": False}
        stages = self._stages(self.parts)
        if self.schedule == "interleaved_1f1b":
            return ScheduleInterleaved1F1B(stages, **options)
        [stage] = stages
        return (Schedule1F1B if self.schedule == "1f1b" else ScheduleGPipe)(stage, **options)

    def forward_schedule(self, loss: StageLoss) -> Schedule:
        """Return a schedule for the forward of as many microbatches, under ``no_grad``.

        ``loss`` gets the last stage, its input and the targets of one microbatch, and the other
        keyword arguments of ``step``. ``step(tokens, targets=...)`` returns the losses,
        [microbatches], on the rank with the last stage: logits are dropped as soon as their loss is
        known. Dropping the schedule frees its buffers.
        """
        last = self.num_stages - 1
        numbered = zip(self.parts, self.stage_numbers, strict=True)
        stages = self._stages([_ForwardOnly(part, loss, is_last=number == last) for part, number in numbered])
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
                # Without these torch would run every stage once to infer the shapes.
                input_args=self.borders[number],
                output_args=self.borders[number + 1],
                group=self.group,
            )
            for module, number in zip(modules, self.stage_numbers, strict=True)
        ]


class _ForwardOnly(nn.Module):
    """A stage for validation: the last one returns its loss, [1], instead of its logits."""

    def __init__(self, part: nn.Module, loss: StageLoss, *, is_last: bool) -> None:
        super().__init__()
        self.part = part
        self.loss = loss
        self.is_last = is_last

    def forward(self, x: Tensor, targets: Tensor | None = None, **options: Any) -> Tensor:
        """Run the stage on tokens, or on the output of the stage before.

        Only the rank with the last stage gets ``targets``. All get ``options``.
        """
        if not self.is_last:
            return self.part(x, **options)
        assert targets is not None
        return self.loss(self.part, x, targets, **options)[None]


def border_tensors(
    stages: Sequence[nn.Module], *, batch_size: int, seq_len: int, dtype: torch.dtype, tp: int
) -> list[Tensor]:
    """Return what passes the borders of all ``stages``, as meta tensors, for one microbatch.

    ``stages`` are not sharded, and on the meta device. Stages with ``stage_output_shape`` say what
    they return. Others are run on meta tensors in ``dtype``; with tensor parallelism that says
    nothing, and raises ConfigError.
    """
    tokens = torch.empty(batch_size, seq_len, dtype=torch.int64, device="meta")
    borders = [tokens]
    for stage in stages:
        shape: Any = getattr(stage, "stage_output_shape", None)
        if callable(shape):
            sizes: Any = shape(batch_size, seq_len, tp)
            output = torch.empty(sizes, dtype=dtype, device="meta")
        elif tp > 1:
            problem = f"{tp} with a pipeline needs {type(stage).__name__}.stage_output_shape()"
            raise ConfigError([ConfigIssue("distributed.tp", problem, "set tp = 1, or add the method")])
        else:
            with torch.device("meta"), torch.no_grad():
                output = copy.deepcopy(stage).to(dtype)(borders[-1])
        borders.append(output.requires_grad_())
    return borders
