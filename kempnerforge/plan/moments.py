"""The moments of a step in which a device may hold the most, and what it holds in each.

Without a pipeline a rank gathers one layer at a time, and FSDP2 frees every weight after its forward pass,
the root's (embedding, last norm, output layer) too. Six moments compete:

- the **loss**: all activations are there, and fp32 copies of the logits;
- the **head**: the gradient of the logits, the root's weights, gathered again, and the gradient of the output
  layer;
- a **layer's backward pass**: the activations of this layer and of those below it, its temporaries, its whole
  weights and those that are being gathered for the next one, and its whole gradients;
- the **reduction** of its gradients: they are copied to fp32 buffers, of which two live at once;
- the **end**: the gradients of the root are reduced, and those of all layers are there;
- the **update**: all gradients, and temporaries of an optimizer that is not fused.

Stages of ``torch.distributed.pipelining`` reduce gradients once, after the last microbatch: all their weights
stay gathered meanwhile, and whole fp32 gradients add up from the first backward pass on. Every microbatch
between its forward and its backward pass keeps its activations, and on the last stage its logits and their
log-probabilities too. So the schedule is gone through action by action.

A pipeline's **validation** needs no gradients, but its schedule has receive buffers of its own, beside those
of training, and keeps what every stage hands on until the last microbatch has passed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kempnerforge.config.job import JobConfig
from kempnerforge.config.parallel_dims import ParallelDims
from kempnerforge.config.pipeline_stages import Stage
from kempnerforge.plan import activations
from kempnerforge.plan.pipeline import microbatch_size, schedule_order
from kempnerforge.plan.tensors import gathered_numel, layer_parameters, local_numel, outer_parameters

FP32 = 4


@dataclass(frozen=True)
class Moment:
    """What is there beside weights, optimizer state and receive buffers, in bytes."""

    name: str
    """ "loss", "head", "backward", "reduction", "end", "update" or "validation"."""
    gradients: float = 0
    """This rank's shards of them."""
    gathered: float = 0
    """Whole weights and whole gradients, and the buffers of their collectives."""
    activations: float = 0
    """Of all microbatches in flight, logits and log-probabilities included."""
    working: float = 0
    """Temporaries of the loss, of a layer, or of the optimizer."""

    @property
    def total(self) -> float:
        """All of them together."""
        return self.gradients + self.gathered + self.activations + self.working


class _Sizes:
    """Bytes of what the moments are made of, on the ranks that hold ``stages``."""

    def __init__(self, job: JobConfig, geometry: ParallelDims, stages: Sequence[Stage]) -> None:
        model, train, tp = job.model, job.train, geometry.tp
        tokens = microbatch_size(job.distributed, train) * train.seq_len
        self.element = activations.element_bytes(train)
        self.shards = geometry.dp_shard
        self.layers = sum(len(stage.layers) for stage in stages)
        self.layer = gathered_numel(layer_parameters(model, 0), tp)
        self.outer = max(gathered_numel(outer_parameters(model, stage), tp) for stage in stages)
        self.table = max(
            (gathered_numel([one], tp) for stage in stages for one in outer_parameters(model, stage)),
            default=0,
        )
        outer = [one for stage in stages for one in outer_parameters(model, stage)]
        self.whole = self.layers * self.layer + gathered_numel(outer, tp)
        self.local_layer = FP32 * local_numel(layer_parameters(model, 0), geometry)
        self.local_outer = FP32 * local_numel(outer, geometry)
        self.kept_layer = tokens * activations.kept_by_layer(model, train, tp)
        self.kept_head = tokens * activations.kept_by_head(model, train, tp)
        self.boundary = tokens * activations.boundary(model, train, tp)
        self.working = tokens * activations.working_set(model, train, tp)
        self.temporaries = tokens * activations.temporaries(model, train, tp)
        self.logits = tokens * activations.logits(model, train, tp)
        self.log_probs = tokens * activations.log_probs(model, tp)
        self.update = 0 if job.optimizer.fused else self.layers * self.local_layer + self.local_outer


def local_moments(job: JobConfig, geometry: ParallelDims, stage: Stage) -> Iterator[Moment]:
    """Of a step without a pipeline; with accumulation, of its last micro-batch."""
    sizes = _Sizes(job, geometry, [stage])
    element, layer, outer = sizes.element, sizes.layer, sizes.outer
    everything = sizes.layers * sizes.local_layer + sizes.local_outer
    earlier = everything if geometry.accumulation_steps > 1 else 0
    kept = sizes.layers * sizes.kept_layer
    yield Moment("loss", earlier, 0, kept + sizes.kept_head, _loss_working(sizes))
    root = element * (outer + sizes.table)
    yield Moment("head", earlier, root + 2 * element * layer, kept + sizes.kept_head, sizes.logits)
    for done in {0, min(1, sizes.layers - 1), sizes.layers - 1}:
        # The gradients of layers that have been reduced, the newest of them still in its buffer, too.
        gradients = earlier or done * sizes.local_layer
        left, reduced = kept - done * sizes.kept_layer, FP32 * layer * min(1, done)
        yield Moment("backward", gradients, root + 3 * element * layer + reduced, left, sizes.working)
        gathered = root + 2 * element * layer + FP32 * layer + reduced
        yield Moment("reduction", gradients, gathered, left - sizes.kept_layer)
    gradients = earlier or sizes.layers * sizes.local_layer
    yield Moment("end", gradients, _reduction(sizes, element * outer, outer) + FP32 * layer)
    yield Moment("update", everything, working=sizes.update)


def pipeline_moments(
    job: JobConfig, geometry: ParallelDims, stages: Sequence[Stage], pp_rank: int
) -> Iterator[Moment]:
    """Of a step of a rank that holds ``stages``, over all its microbatches."""
    sizes = _Sizes(job, geometry, stages)
    weights, gradients = sizes.element * sizes.whole, 0
    kept = [_kept_by_stage(sizes, stage) for stage in stages]
    alive, heads = 0.0, 0
    for is_forward, number in schedule_order(job.distributed, geometry.pp_microbatches, pp_rank):
        stage = stages[number]
        waiting = (sizes.logits + sizes.log_probs) * heads
        if is_forward:
            alive += kept[number]
            heads += stage.has_head
            if stage.has_head:
                yield Moment("loss", 0, weights + gradients, alive + waiting, _loss_forward(sizes))
            continue
        if stage.has_head:
            heads -= 1
            others = waiting - sizes.logits - sizes.log_probs
            yield Moment("loss", 0, weights + gradients, alive + others, _loss_working(sizes) + sizes.logits)
            # The schedule holds on to the logits until the end of the backward pass.
            waiting = others + sizes.logits
            whole = weights + gradients + sizes.element * sizes.table
            yield Moment("head", 0, whole, alive + waiting, sizes.logits)
        first = FP32 * (sizes.layer + (sizes.outer if stage.has_head else 0))
        whole = weights + (gradients or first) + sizes.element * sizes.layer
        if stage.has_head and sizes.element < FP32:
            whole += sizes.element * sizes.table  # the root adds its gradients up when its backward pass ends
        yield Moment("backward", 0, whole, alive + waiting, sizes.working)
        gradients = FP32 * sizes.whole
        alive -= kept[number]
        if stage.has_embedding:
            whole = weights + gradients + sizes.element * sizes.table
            yield Moment("backward", 0, whole, alive + waiting)
    for group in (sizes.outer, sizes.layer):
        rest = sizes.whole - group
        yield Moment("end", 0, _reduction(sizes, FP32 * group, group) + (sizes.element + FP32) * rest)
    everything = sizes.layers * sizes.local_layer + sizes.local_outer
    yield Moment("update", everything, working=sizes.update)
    if job.eval.interval:
        yield _validation(sizes, stages, geometry.pp_microbatches)


def _validation(sizes: _Sizes, stages: Sequence[Stage], microbatches: int) -> Moment:
    """The last microbatch of a validation."""
    ends = sum((not stage.has_embedding) + (not stage.has_head) for stage in stages)
    has_head = any(stage.has_head for stage in stages)
    working = max(sizes.temporaries, _loss_forward(sizes) if has_head else 0)
    return Moment("validation", 0, sizes.element * sizes.whole, ends * microbatches * sizes.boundary, working)


def _kept_by_stage(sizes: _Sizes, stage: Stage) -> float:
    """Bytes that a microbatch keeps in a stage; what it received is in a receive buffer, counted there."""
    kept = len(stage.layers) * sizes.kept_layer
    kept += sizes.kept_head if stage.has_head else sizes.boundary
    return kept - (0 if stage.has_embedding else sizes.boundary)


def _loss_forward(sizes: _Sizes) -> float:
    """Logits, a copy of them in fp32 where they are not, and log-probabilities."""
    copies = 1 if sizes.element < FP32 else 0
    return sizes.logits + (1 + copies) * sizes.log_probs


def _loss_working(sizes: _Sizes) -> float:
    """Log-probabilities, and two gradients of their size."""
    return 3 * sizes.log_probs


def _reduction(sizes: _Sizes, gradients: float, numel: int) -> float:
    """Of whole ``gradients``: copied to a buffer, reduced into another; on one rank divided in between."""
    buffer = FP32 * numel
    if sizes.shards == 1:
        return max(gradients + buffer, 3 * buffer)
    return max(gradients + buffer, buffer + buffer / sizes.shards)
