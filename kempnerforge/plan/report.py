"""The results of ``kempnerforge plan`` for a job on a number of processes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from kempnerforge.config.job import JobConfig
from kempnerforge.config.parallel_dims import ParallelDims
from kempnerforge.config.pipeline_stages import Stage, make_stages, stages_of
from kempnerforge.plan.checkpoint_size import CheckpointSize, checkpoint_size, staged_bytes, staged_on_node
from kempnerforge.plan.memory import RESERVED_SHARE, DeviceMemory, device_memory
from kempnerforge.plan.optimizer_state import BUILT_IN, OptimizerState
from kempnerforge.plan.pipeline import bubble_fraction, in_flight, microbatch_size
from kempnerforge.plan.tensors import local_numel, stage_parameters


@dataclass(frozen=True)
class PipelineRank:
    """Contents and memory of the ranks at one position of the pipeline; without a pipeline, of all ranks."""

    first_rank: int
    last_rank: int
    """The ranks from ``first_rank`` to this one are at this position."""
    stages: tuple[Stage, ...]
    parameters: int
    """Exact number of parameters of the rank with the most."""
    in_flight: int
    """Maximum number of (stage, microbatch) pairs whose activations exist at once."""
    memory: DeviceMemory
    staged_bytes: int
    """Host memory of the rank that stages the most for a checkpoint."""


CHEAPER = 0.95
"""Another loss is named if the memory with it is at most this fraction of the memory without."""


@dataclass(frozen=True)
class CheaperLoss:
    """The same loss, computed in less memory."""

    name: str
    """``train.loss``."""
    device_bytes: int
    """Device memory of the rank that would need the most."""


@dataclass(frozen=True)
class Plan:
    """A job on a number of processes."""

    job: JobConfig
    geometry: ParallelDims
    pipeline: tuple[PipelineRank, ...]
    microbatch_size: int
    bubble_fraction: float
    checkpoint: CheckpointSize
    ranks_per_node: int
    cheaper_loss: CheaperLoss | None
    staged_on_node_bytes: int
    """Host memory of the node whose ranks together stage the most."""
    unknown_optimizer: str
    """Why the state of the optimizer is not known and not counted; empty if it is."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over all ranks."""
        return self.geometry.global_batch_size * self.job.train.seq_len

    @property
    def device_bytes(self) -> int:
        """Device memory of the rank that needs the most."""
        return max(group.memory.total for group in self.pipeline)

    def fits(self, memory_gb: float) -> bool:
        """Return whether all ranks fit devices of ``memory_gb``, of which ``RESERVED_SHARE`` is reserved."""
        return all(group.memory.fits(memory_gb * 1e9) for group in self.pipeline)

    def to_json(self, memory_gb: float | None = None) -> dict[str, Any]:
        """Return plain JSON types, with sizes in bytes."""
        geometry = self.geometry
        body: dict[str, Any] = {
            "possible": True,
            "world_size": geometry.world_size,
            "mesh": geometry.mesh,
            "groups": {dim: geometry.groups(dim) for dim, size in geometry.mesh.items() if size > 1},
            "parameters": self.job.model.num_parameters,
            "pipeline": [_group_json(group) for group in self.pipeline],
            "device_bytes": self.device_bytes,
            "cheaper_loss": self.cheaper_loss and dataclasses.asdict(self.cheaper_loss),
            "staged_on_node_bytes": self.staged_on_node_bytes,
            "ranks_per_node": self.ranks_per_node,
            "async_mode": self.job.checkpoint.async_mode.value,
            "checkpoint": dataclasses.asdict(self.checkpoint),
            "global_batch_size": geometry.global_batch_size,
            "tokens_per_step": self.tokens_per_step,
            "accumulation_steps": geometry.accumulation_steps,
            "microbatch_size": self.microbatch_size,
            "pp_microbatches": geometry.pp_microbatches,
            "bubble_fraction": self.bubble_fraction,
        }
        if self.unknown_optimizer:
            body["unknown_optimizer"] = self.unknown_optimizer
        if memory_gb is not None:
            body |= {"memory_gb": memory_gb, "reserved_share": RESERVED_SHARE, "fits": self.fits(memory_gb)}
        return body


def make_plan(
    job: JobConfig, world_size: int, *, ranks_per_node: int = 8, probed: OptimizerState | None = None
) -> Plan:
    """Compute the plan. Raises ConfigError if ``world_size`` processes do not fit the layout.

    ``probed``: see ``plan.optimizer_state.state_of``.
    """
    geometry = job.geometry(world_size)
    pipeline = tuple(_group(job, geometry, pp_rank, probed) for pp_rank in range(geometry.pp))
    unknown_optimizer = ""
    if job.optimizer.name not in BUILT_IN:
        unknown_optimizer = probed.problem if probed is not None else "it was not looked at"
    return Plan(
        job=job,
        geometry=geometry,
        pipeline=pipeline,
        microbatch_size=microbatch_size(job.distributed, job.train),
        bubble_fraction=bubble_fraction(job.distributed, geometry.pp_microbatches),
        checkpoint=checkpoint_size(job, geometry, probed),
        ranks_per_node=ranks_per_node,
        cheaper_loss=_cheaper_loss(job, geometry, max(group.memory.total for group in pipeline), probed),
        staged_on_node_bytes=staged_on_node(
            [group.staged_bytes for group in pipeline], geometry, ranks_per_node
        ),
        unknown_optimizer=unknown_optimizer,
    )


def _cheaper_loss(
    job: JobConfig, geometry: ParallelDims, device_bytes: int, probed: OptimizerState | None
) -> CheaperLoss | None:
    """Return the other loss of the same value, if it needs clearly less memory."""
    others = {"cross_entropy": "chunked_cross_entropy", "chunked_cross_entropy": "cross_entropy"}
    if job.train.loss not in others:
        return None
    train = job.train.model_copy(update={"loss": others[job.train.loss], "loss_args": {}})
    other = job.model_copy(update={"train": train})
    need = max(device_memory(other, geometry, pp_rank, probed).total for pp_rank in range(geometry.pp))
    return CheaperLoss(train.loss, need) if need <= CHEAPER * device_bytes else None


def _group(
    job: JobConfig, geometry: ParallelDims, pp_rank: int, probed: OptimizerState | None
) -> PipelineRank:
    stages = stages_of(make_stages(job.model, job.distributed), pp_rank, geometry.pp)
    ranks = geometry.world_size // geometry.pp
    held = [parameter for stage in stages for parameter in stage_parameters(job.model, stage)]
    return PipelineRank(
        first_rank=pp_rank * ranks,
        last_rank=(pp_rank + 1) * ranks - 1,
        stages=stages,
        parameters=local_numel(held, geometry),
        in_flight=in_flight(job.distributed, geometry.pp_microbatches, pp_rank),
        memory=device_memory(job, geometry, pp_rank, probed),
        staged_bytes=staged_bytes(job, geometry, pp_rank, probed),
    )


def _group_json(group: PipelineRank) -> dict[str, Any]:
    return {
        "ranks": [group.first_rank, group.last_rank],
        "stages": [dataclasses.asdict(stage) for stage in group.stages],
        "parameters": group.parameters,
        "in_flight": group.in_flight,
        "memory": {**dataclasses.asdict(group.memory), "total": group.memory.total},
        "staged_bytes": group.staged_bytes,
    }
