"""Device memory of a rank: its permanent state (exact) and the peak of temporary memory (estimated).

The permanent state is the weights in fp32 and the optimizer's state, sharded. FSDP pads every shard
to the length of the largest. Temporary memory is computed for every moment of a step that may
be the peak (``plan.moments``), and the largest sum is used. Tests compare it with the live tensors
of real steps. Activations are counted as if all parameters were trained: frozen ones need fewer.

The sum does not include the CUDA context, NCCL's buffers and fragmentation. ``RESERVED_SHARE`` of a
device is reserved for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kempnerforge.config.job import JobConfig
from kempnerforge.config.parallel_dims import ParallelDims
from kempnerforge.config.pipeline_stages import Stage, make_stages, stages_of
from kempnerforge.plan import activations
from kempnerforge.plan.moments import local_moments, pipeline_moments
from kempnerforge.plan.optimizer_state import OptimizerState, state_of
from kempnerforge.plan.pipeline import microbatch_size
from kempnerforge.plan.tensors import Parameter, local_numel, local_shape, stage_parameters

RESERVED_SHARE = 0.1
"""Fraction of a device's memory that is reserved for what the sum does not include."""
FP32 = 4


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes at the peak of a step on the device of the rank with the largest shards of its stages."""

    weights: int
    gradients: int
    """This rank's shards of the gradients that exist at the peak."""
    optimizer: int
    """Its state tensors, without scalars (``plan.optimizer_state``)."""
    gathered: int
    """Unsharded weights and gradients in use."""
    activations: int
    """Activations of all microbatches in flight, with their logits."""
    buffers: int
    """Receive buffers of the pipeline: torch allocates one per microbatch and direction."""
    working: int
    """Temporaries of the loss, of a layer in its backward pass, or of the optimizer."""
    peak: str
    """Name of the moment of the peak, see ``plan.moments``."""

    @property
    def total(self) -> int:
        """Sum of all parts."""
        state = self.weights + self.gradients + self.optimizer
        return state + self.gathered + self.activations + self.buffers + self.working

    def fits(self, device_bytes: float) -> bool:
        """Return whether it fits a device of ``device_bytes``, of which ``RESERVED_SHARE`` is reserved."""
        return self.total <= (1 - RESERVED_SHARE) * device_bytes


def device_memory(
    job: JobConfig, geometry: ParallelDims, pp_rank: int, probed: OptimizerState | None = None
) -> DeviceMemory:
    """Return the memory of the rank with the largest shards among the ranks at ``pp_rank``.

    ``probed``: see ``plan.optimizer_state.state_of``.
    """
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
        optimizer=optimizer_bytes(job, geometry, everything, probed),
        gathered=round(peak.gathered),
        activations=round(peak.activations),
        buffers=_buffers(job, geometry, stages),
        working=round(peak.working),
        peak=peak.name,
    )


def optimizer_bytes(
    job: JobConfig, geometry: ParallelDims, parameters: Sequence[Parameter], probed: OptimizerState | None
) -> int:
    """Return the bytes of the state tensors of a rank with its shards of ``parameters``, without scalars."""
    return sum(
        tensor.size_bytes(local_shape(parameter, geometry))
        for parameter in parameters
        for tensor in state_of(job, parameter, probed).tensors
        if tensor.kind != "scalar"
    )


def _buffers(job: JobConfig, geometry: ParallelDims, stages: Sequence[Stage]) -> int:
    """Return the bytes of receive buffers: one per stage, microbatch and direction."""
    if geometry.pp == 1:
        return 0
    directions = sum((not stage.has_embedding) + (not stage.has_head) for stage in stages)
    tokens = microbatch_size(job.distributed, job.train) * job.train.seq_len
    per_token = activations.boundary(job.model, job.train, geometry.tp)
    return round(tokens * directions * geometry.pp_microbatches * per_token)
