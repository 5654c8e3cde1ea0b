"""What this rank holds of the model, and the step that goes with it: all that differs between layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from kempnerforge.config.pipeline_stages import make_stages, num_stages, stages_of
from kempnerforge.config.schema import JobConfig, ParallelDims, TrainConfig
from kempnerforge.distributed import timeouts
from kempnerforge.distributed.mesh import build_mesh
from kempnerforge.model.llama import Llama
from kempnerforge.parallel.shard import materialize, parallelize
from kempnerforge.train.optimizer import parameter_groups
from kempnerforge.train.step import LocalStep, TrainStep

if TYPE_CHECKING:
    from kempnerforge.parallel.pipeline import Pipeline


@dataclass(frozen=True)
class ParallelModel:
    """A rank's parts of the model, sharded, with memory."""

    parts: Sequence[Llama]
    """The whole model, or this rank's stages of it."""
    groups: dict[str, list[str]]
    """Names of the **whole** model's parameters by optimizer group, in the model's order."""
    pipeline: Pipeline | None
    device: torch.device

    def step(self, optimizer: torch.optim.Optimizer, geometry: ParallelDims, train: TrainConfig) -> TrainStep:
        """How this rank takes an optimizer step."""
        assert dist.group.WORLD is not None
        options = {
            "device": self.device,
            "group": dist.group.WORLD,
            "grad_clip_norm": train.grad_clip_norm,
            "loss_copies": geometry.tp,
        }
        if self.pipeline is not None:
            # Here and below, not above: torch's pipelining imports its compiler, half a second.
            from kempnerforge.train.pipeline_step import PipelineStep

            return PipelineStep(self.pipeline, optimizer, **options)
        return LocalStep(self.parts[0], optimizer, **options)


def build_model(
    job: JobConfig, geometry: ParallelDims, *, rank: int, device: torch.device, draw: bool
) -> ParallelModel:
    """The parts of the model that ``rank`` holds. Collective: all ranks.

    ``draw``: with initial weights; else they are to be loaded before anything reads them.
    """
    mesh = build_mesh(
        device.type,
        dp_replicate=geometry.dp_replicate,
        dp_shard=geometry.dp_shard,
        tp=geometry.tp,
        pp=geometry.pp,
    )
    with torch.device("meta"):
        model = Llama(job.model)
    groups = {name: list(params) for name, params in parameter_groups([model]).items()}
    parts, pipeline = [model], None
    if geometry.pp > 1:
        from kempnerforge.parallel.pipeline import Pipeline

        stages = stages_of(make_stages(job.model, job.distributed), geometry.pp_rank(rank), geometry.pp)
        with torch.device("meta"):
            parts = [Llama(job.model) for _ in stages]
        for part, stage in zip(parts, stages, strict=True):
            part.keep_stage(stage)
        pipeline = Pipeline(
            parts=parts,
            stage_numbers=[stage.index for stage in stages],
            num_stages=num_stages(job.distributed),
            schedule=job.distributed.pp_schedule,
            microbatches=geometry.pp_microbatches,
            microbatch_size=job.distributed.pp_microbatch_size or 1,
            seq_len=job.train.seq_len,
            dtype=torch.bfloat16 if job.train.mixed_precision == "bf16" else torch.float32,
            device=device,
            group=mesh.get_group("pp"),
        )
    for part in parts:
        parallelize(part, mesh, job.train)
        materialize(part, device, seed=job.train.seed if draw else None)
    timeouts.give_all_groups_the_default_timeout()  # also those that sharding and pipelining have made
    return ParallelModel(parts, groups, pipeline, device)
