"""The plan of a model of the user's: its state is exact, its activations are what the model tells.

The parameters come from ``train.own_model``, which builds the model. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kempnerforge.config.job import JobConfig
from kempnerforge.config.parallel_dims import ParallelDims
from kempnerforge.plan.checkpoint_size import CheckpointSize, size_of, staged_bytes_of, staged_on_node
from kempnerforge.plan.memory import FP32, optimizer_bytes
from kempnerforge.plan.optimizer_state import OptimizerState
from kempnerforge.plan.tensors import Parameter, local_numel, trained


@dataclass(frozen=True)
class OwnModelRank:
    """Contents and state of the ranks at one position of the pipeline; without a pipeline, of all ranks."""

    first_rank: int
    last_rank: int
    parameters: int
    """Exact number of parameters of the rank with the most."""
    weights: int
    """Bytes, in fp32."""
    gradients: int
    optimizer: int
    staged_bytes: int
    """Host memory of the rank that stages the most for a checkpoint."""

    @property
    def state(self) -> int:
        """Bytes of weights, gradients and optimizer state, which exist together in every update."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class OwnModelPlan:
    """A job with a model of the user's on a number of processes."""

    job: JobConfig
    geometry: ParallelDims
    num_parameters: int
    pipeline: tuple[OwnModelRank, ...]
    checkpoint: CheckpointSize
    ranks_per_node: int
    staged_on_node_bytes: int
    activation_bytes: int | None
    """What a micro-batch keeps for its backward pass, if the model tells."""
    unknown_optimizer: str
    """Why the state of the optimizer is not known; empty if it is."""

    @property
    def device_bytes(self) -> int:
        """Device memory that the rank with the most needs at least."""
        return max(rank.state for rank in self.pipeline) + (self.activation_bytes or 0)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types, with sizes in bytes."""
        geometry = self.geometry
        return {
            "possible": True,
            "model": self.job.model.name,
            "world_size": geometry.world_size,
            "mesh": geometry.mesh,
            "parameters": self.num_parameters,
            "pipeline": [{**dataclasses.asdict(rank), "state": rank.state} for rank in self.pipeline],
            "activation_bytes": self.activation_bytes,
            "device_bytes_at_least": self.device_bytes,
            "checkpoint": dataclasses.asdict(self.checkpoint),
            "staged_on_node_bytes": self.staged_on_node_bytes,
            "ranks_per_node": self.ranks_per_node,
            "global_batch_size": geometry.global_batch_size,
            "accumulation_steps": geometry.accumulation_steps,
            "unknown_optimizer": self.unknown_optimizer,
        }


def plan_own_model(
    job: JobConfig,
    geometry: ParallelDims,
    stages: Sequence[Sequence[Parameter]],
    *,
    activation_bytes: int | None,
    ranks_per_node: int,
    probed: OptimizerState | None,
) -> OwnModelPlan:
    """Return the plan of a model whose pipeline stages have ``stages``; one without a pipeline."""
    everything = [parameter for stage in stages for parameter in stage]
    pipeline = tuple(_rank(job, geometry, stages, pp_rank, probed) for pp_rank in range(geometry.pp))
    staged = [rank.staged_bytes for rank in pipeline]
    return OwnModelPlan(
        job=job,
        geometry=geometry,
        num_parameters=sum(parameter.numel for parameter in everything),
        pipeline=pipeline,
        checkpoint=size_of(everything, job, geometry, probed),
        ranks_per_node=ranks_per_node,
        staged_on_node_bytes=staged_on_node(staged, geometry, ranks_per_node),
        activation_bytes=activation_bytes,
        unknown_optimizer=probed.problem if probed is not None else "",
    )


def _rank(
    job: JobConfig,
    geometry: ParallelDims,
    stages: Sequence[Sequence[Parameter]],
    pp_rank: int,
    probed: OptimizerState | None,
) -> OwnModelRank:
    held = [parameter for stage in stages[pp_rank :: geometry.pp] for parameter in stage]
    ranks = geometry.world_size // geometry.pp
    numel, trained_numel = local_numel(held, geometry), local_numel(trained(held), geometry)
    return OwnModelRank(
        first_rank=pp_rank * ranks,
        last_rank=(pp_rank + 1) * ranks - 1,
        parameters=numel,
        weights=FP32 * numel,
        gradients=FP32 * trained_numel,
        optimizer=optimizer_bytes(job, geometry, held, probed),
        staged_bytes=staged_bytes_of(held, job, geometry, probed),
    )
