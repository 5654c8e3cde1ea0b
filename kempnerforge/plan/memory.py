"""Device memory that one rank needs: what stays (exact), and the most that comes on top of it (an estimate).

Weights and AdamW's two moments are fp32 and sharded; FSDP pads every shard to the length of the largest. They
stay. What comes on top is looked up in every moment of a step that may be the peak (``plan.moments``), and
the largest sum counts. Tests compare the sum with the live tensors of real steps.

Not in the sum: the CUDA context, NCCL's buffers and fragmentation. ``RESERVED_SHARE`` of a device is kept for
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kempnerforge.config.job import JobConfig
from kempnerforge.config.parallel_dims import ParallelDims
from kempnerforge.config.pipeline_stages import Stage, make_stages, stages_of
from kempnerforge.plan import activations
from kempnerforge.plan.moments import local_moments, pipeline_moments
from kempnerforge.plan.pipeline import microbatch_size
from kempnerforge.plan.tensors import local_numel, stage_parameters

RESERVED_SHARE = 0.1
"""Of a device's memory, for what the sum leaves out."""
FP32 = 4


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on the device of the rank with the most of one pipeline rank's stages, at the peak of a step."""

    weights: int
    gradients: int
    """This rank's shards of those that are there at the peak."""
    optimizer: int
    """AdamW's two moments."""
    gathered: int
    """Whole weights and whole gradients of what is in use."""
    activations: int
    """Of all microbatches in flight, with their logits."""
    buffers: int
    """What pipeline ranks receive into: torch has a buffer for every microbatch of the step and direction."""
    working: int
    """Temporaries of the loss, of a layer in its backward pass, or of the optimizer."""
    peak: str
    """The moment of the peak, as ``plan.moments`` names it."""

    @property
    def total(self) -> int:
        """All of them together."""
        state = self.weights + self.gradients + self.optimizer
        return state + self.gathered + self.activations + self.buffers + self.working

    def fits(self, device_bytes: float) -> bool:
        """Whether it fits a device of ``device_bytes``, ``RESERVED_SHARE`` of which is left free."""
        return self.total <= (1 - RESERVED_SHARE) * device_bytes


def device_memory(job: JobConfig, geometry: ParallelDims, pp_rank: int) -> DeviceMemory:
    """What the ranks at ``pp_rank`` of the pipeline need; of them, the one that holds the most."""
    stages = stages_of(make_stages(job.model, job.distributed), pp_rank, geometry.pp)
    everything = [parameter for stage in stages for parameter in stage_parameters(job.model, stage)]
    state = FP32 * local_numel(everything, geometry)
    if geometry.pp > 1:
        moments = pipeline_moments(job, geometry, stages, pp_rank)
    else:
        moments = local_moments(job, geometry, stages[0])
    peak = max(moments, key=lambda moment: moment.total)
    return DeviceMemory(
        weights=state,
        gradients=round(peak.gradients),
        optimizer=2 * state,
        gathered=round(peak.gathered),
        activations=round(peak.activations),
        buffers=_buffers(job, geometry, stages),
        working=round(peak.working),
        peak=peak.name,
    )


def _buffers(job: JobConfig, geometry: ParallelDims, stages: Sequence[Stage]) -> int:
    """Bytes of receive buffers: one for each stage, microbatch and direction."""
    if geometry.pp == 1:
        return 0
    directions = sum((not stage.has_embedding) + (not stage.has_head) for stage in stages)
    tokens = microbatch_size(job.distributed, job.train) * job.train.seq_len
    per_token = activations.boundary(job.model, job.train, geometry.tp)
    return round(tokens * directions * geometry.pp_microbatches * per_token)
