"""Device memory that one rank needs: what stays (exact), and the most that comes on top of it (an estimate).

Weights, gradients and AdamW's two moments are fp32 and sharded; FSDP pads every shard to the length of the
largest. Three moments of a step compete for the peak, and the largest sum counts:

- the **loss**: all activations are there, and fp32 copies of the logits;
- a **layer's backward pass**: all activations, the layer's own temporaries, its whole weights and those being
  gathered for the next one, its gradients in the precision of the pass and once more, fp32, to be reduced;
- the **end**: no activations are left, and the gradients of embedding and output layer are reduced.

In FSDP2 the root (embedding, last norm, output layer) stays gathered from the forward pass to the end of the
backward pass. Stages of ``torch.distributed.pipelining`` reduce gradients once, after the last microbatch:
all their weights stay gathered meanwhile, and whole fp32 gradients add up.

Not in the sum: the CUDA context, NCCL's buffers and fragmentation. ``RESERVED_SHARE`` of a device is kept for
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kempnerforge.config.geometry import Geometry
from kempnerforge.config.job import JobConfig
from kempnerforge.config.stages import Stage, make_stages, stages_of
from kempnerforge.plan import activations
from kempnerforge.plan.pipeline import in_flight, microbatch_size
from kempnerforge.plan.tensors import (
    gathered_numel,
    layer_parameters,
    local_numel,
    outer_parameters,
    stage_parameters,
)

RESERVED_SHARE = 0.1
"""Of a device's memory, for what the sum leaves out."""
FP32 = 4


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on the device of the rank with the most of one pipeline rank's stages, at the peak of a step."""

    weights: int
    gradients: int
    optimizer: int
    """AdamW's two moments."""
    gathered: int
    """Whole weights and whole gradients of what is in use."""
    activations: int
    buffers: int
    """What pipeline ranks receive into: torch has a buffer for every microbatch of the step and direction."""
    working: int
    """Logits and loss, or the temporaries of the layer in its backward pass."""
    peak: str
    """The moment of the peak: "loss", "backward" or "end"."""

    @property
    def total(self) -> int:
        """All of them together."""
        state = self.weights + self.gradients + self.optimizer
        return state + self.gathered + self.activations + self.buffers + self.working

    def fits(self, device_bytes: float) -> bool:
        """Whether it fits a device of ``device_bytes``, ``RESERVED_SHARE`` of which is left free."""
        return self.total <= (1 - RESERVED_SHARE) * device_bytes


def device_memory(job: JobConfig, geometry: Geometry, pp_rank: int) -> DeviceMemory:
    """What the ranks at ``pp_rank`` of the pipeline need; of them, the one that holds the most."""
    stages = stages_of(make_stages(job.model, job.distributed), pp_rank, geometry.pp)
    everything = [parameter for stage in stages for parameter in stage_parameters(job.model, stage)]
    state = FP32 * local_numel(everything, geometry)
    kept = _activations(job, geometry, stages, pp_rank)
    moments = _moments(job, geometry, stages, kept)
    peak = max(moments, key=lambda name: sum(moments[name]))
    gathered, alive, working = moments[peak]
    return DeviceMemory(
        weights=state,
        gradients=state,
        optimizer=2 * state,
        gathered=gathered,
        activations=alive,
        buffers=_buffers(job, geometry, stages, pp_rank),
        working=working,
        peak=peak,
    )


def _moments(
    job: JobConfig, geometry: Geometry, stages: Sequence[Stage], kept: int
) -> dict[str, tuple[int, int, int]]:
    """Moment -> bytes gathered, of activations, and to work with."""
    model, train, tp = job.model, job.train, geometry.tp
    element = activations.element_bytes(train)
    tokens = microbatch_size(job.distributed, train) * train.seq_len
    layer = gathered_numel(layer_parameters(model, 0), tp)
    outer = gathered_numel([one for stage in stages for one in outer_parameters(model, stage)], tp)
    working = round(tokens * activations.working_set(model, train, tp))
    loss = 0
    if any(stage.has_head for stage in stages):
        per_token = activations.loss_peak(model, train, tp, output_stays=geometry.pp > 1)
        loss = round(tokens * per_token)
    if geometry.pp > 1:
        num_layers = sum(len(stage.layers) for stage in stages)
        whole = (element + FP32) * (num_layers * layer + outer)
        return {
            "loss": (whole, kept, loss),
            "backward": (whole + element * layer, kept, working),
            "end": (whole + FP32 * max(layer, outer), 0, 0),
        }
    weights = element * (outer + 2 * layer)
    return {
        "loss": (weights, kept, loss),
        "backward": (weights + (element + 2 * FP32) * layer + element * outer, kept, working),
        "end": ((2 * element + FP32) * outer, 0, 0),
    }


def _activations(job: JobConfig, geometry: Geometry, stages: Sequence[Stage], pp_rank: int) -> int:
    """Bytes of all activations that are kept at once, over all microbatches in flight.

    Where a rank has several stages, the one with the most layers stands for all: an upper bound.
    """
    model, train, tp = job.model, job.train, geometry.tp
    tokens = microbatch_size(job.distributed, train) * train.seq_len
    flying = in_flight(job.distributed, geometry.pp_microbatches, pp_rank)
    layers = max(len(stage.layers) for stage in stages)
    per_token = flying * layers * activations.kept_by_layer(model, train, tp)
    if any(stage.has_head for stage in stages):
        per_token += activations.kept_by_head(model, train, tp)
    if geometry.pp > 1:
        per_token += flying * activations.boundary(model, train, tp)  # outputs, until their backward pass
    return round(tokens * per_token)


def _buffers(job: JobConfig, geometry: Geometry, stages: Sequence[Stage], pp_rank: int) -> int:
    """Bytes of receive buffers; those of microbatches in flight count as the inputs of layers already."""
    if geometry.pp == 1:
        return 0
    inputs = sum(not stage.has_embedding for stage in stages) * geometry.pp_microbatches
    gradients = sum(not stage.has_head for stage in stages) * geometry.pp_microbatches
    waiting = max(0, inputs - in_flight(job.distributed, geometry.pp_microbatches, pp_rank)) + gradients
    tokens = microbatch_size(job.distributed, job.train) * job.train.seq_len
    return round(tokens * waiting * activations.boundary(job.model, job.train, geometry.tp))
