"""The parts of the model on this rank, and its training step: everything that depends on the layout."""

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
    """A rank's parts of the model, sharded and allocated."""

    parts: Sequence[Llama]
    """The whole model, or the pipeline stages of this rank."""
    groups: dict[str, list[str]]
    """Names of the **whole** model's parameters by optimizer group, in the model's order."""
    pipeline: Pipeline | None
    device: torch.device

    def step(self, optimizer: torch.optim.Optimizer, geometry: ParallelDims, train: TrainConfig) -> TrainStep:
        """Return the training step of this rank."""
        assert dist.group.WORLD is not None
        options = {
            "device": self.device,
            "group": dist.group.WORLD,
            "grad_clip_norm": train.grad_clip_norm,
            "loss_copies": geometry.tp,
        }
        if self.pipeline is not None:
            # Imported here: torch's pipelining imports the compiler, which takes half a second.
            from kempnerforge.train.pipeline_step import PipelineStep

            return PipelineStep(self.pipeline, optimizer, **options)
        return LocalStep(self.parts[0], optimizer, **options)


def build_model(
    job: JobConfig, geometry: ParallelDims, *, rank: int, device: torch.device, init_weights: bool
) -> ParallelModel:
    """Build the parts of the model of ``rank``. Collective: all ranks.

    Without ``init_weights`` the weights must be loaded before anything reads them.
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
        materialize(part, device, seed=job.train.seed if init_weights else None)
    timeouts.give_all_groups_the_default_timeout()  # includes the groups of sharding and pipelining
    return ParallelModel(parts, groups, pipeline, device)
