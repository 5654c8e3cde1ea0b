"""The moments of a step at which device memory may peak, and the memory at each of them.

Without a pipeline, a rank gathers one layer at a time. FSDP2 frees all weights after their forward
pass, including those of the root (embedding, final norm, output layer). Six moments can be the
peak:

- the **loss**: all activations, and fp32 copies of the logits.
- the **head**: the gradient of the logits, the root's weights, which are gathered again, and the
  gradient of the output layer.
- a **layer's backward pass**: the activations of this layer and of those below it, its temporaries,
  its unsharded weights, those being gathered for the next layer, and its unsharded gradients.
- the **reduction** of its gradients: two fp32 buffers to which gradients are copied exist at once.
- the **end**: the gradients of the root, which are being reduced, and those of all layers.
- the **update**: all gradients, and the temporaries of an optimizer that is not fused.

Stages of ``torch.distributed.pipelining`` reduce gradients once, after the last microbatch. Until
then all their weights remain gathered, and unsharded fp32 gradients accumulate from the first
backward pass on. Every microbatch keeps its activations between its forward and its backward pass,
and on the last stage also what its loss needs. Therefore this module simulates
the schedule action by action.

A pipeline's **validation** needs no gradients. Its schedule has its own receive buffers, in
addition to those of training, and keeps the outputs of every stage until the last microbatch has
passed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kempnerforge.config.job import JobConfig
from kempnerforge.config.parallel_dims import ParallelDims
from kempnerforge.config.pipeline_stages import Stage
from kempnerforge.plan import activations
from kempnerforge.plan.losses import loss_memory
from kempnerforge.plan.pipeline import microbatch_size, schedule_order
from kempnerforge.plan.tensors import gathered_numel, layer_parameters, local_numel, outer_parameters, trained

FP32 = 4


@dataclass(frozen=True)
class Moment:
    """Bytes in addition to weights, optimizer state and receive buffers."""

    name: str
    """ "loss", "head", "backward", "reduction", "end", "update" or "validation"."""
    gradients: float = 0
    """This rank's shards of the gradients."""
    gathered: float = 0
    """Unsharded weights and gradients, and the buffers of their collectives."""
    activations: float = 0
    """Activations of all microbatches in flight, including logits and log-probabilities."""
    working: float = 0
    """Temporaries of the loss, of a layer, or of the optimizer."""

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return self.gradients + self.gathered + self.activations + self.working


class _Sizes:
    """Bytes of the components of the moments, on ranks with ``stages``."""

    def __init__(self, job: JobConfig, geometry: ParallelDims, stages: Sequence[Stage]) -> None:
        model, train, tp = job.model, job.train, geometry.tp
        tokens = microbatch_size(job.distributed, train) * train.seq_len
        self.element = activations.element_bytes(train)
        self.shards = geometry.dp_shard
        self.layers = sum(len(stage.layers) for stage in stages)
        self.layer = gathered_numel(layer_parameters(model, 0), tp)
        self.outer = max(gathered_numel(outer_parameters(model, stage), tp) for stage in stages)
        self.table = max(
            (gathered_numel([table], tp) for stage in stages for table in outer_parameters(model, stage)),
            default=0,
        )
        outer = [parameter for stage in stages for parameter in outer_parameters(model, stage)]
        self.whole = self.layers * self.layer + gathered_numel(outer, tp)
        # Frozen parameters have no gradients. Layers may differ in that: the sum counts all layers, and the
        # gradients of a layer are those of the one with most.
        layers = [layer_parameters(model, number) for stage in stages for number in stage.layers]
        self.trained_layer = max((gathered_numel(trained(layer), tp) for layer in layers), default=0)
        self.trained_outer = max(gathered_numel(trained(outer_parameters(model, s)), tp) for s in stages)
        tables = trained(table for stage in stages for table in outer_parameters(model, stage))
        self.trained_table = max((gathered_numel([table], tp) for table in tables), default=0)
        everything = [*outer, *(parameter for layer in layers for parameter in layer)]
        self.trained_whole = gathered_numel(trained(everything), tp)
        of_layers = sum(local_numel(trained(layer), geometry) for layer in layers)
        self.local_layer = FP32 * of_layers / max(1, self.layers)
        self.local_outer = FP32 * local_numel(trained(outer), geometry)
        self.kept_layer = tokens * activations.kept_by_layer(model, train, tp)
        self.kept_head = tokens * activations.kept_by_head(model, train, tp)
        self.rotary_tables = tokens * activations.rotary_tables(model) if job.data.document_mask else 0
        self.boundary = tokens * activations.boundary(model, train, tp)
        self.working = tokens * activations.working_set(model, train, tp)
        self.temporaries = tokens * activations.temporaries(model, train, tp)
        self.loss = loss_memory(job, tp, tokens, self.table)
        self.update = 0 if job.optimizer.fused else self.layers * self.local_layer + self.local_outer


def local_moments(job: JobConfig, geometry: ParallelDims, stage: Stage) -> Iterator[Moment]:
    """Yield the moments of a step without a pipeline; with accumulation, those of its last micro-batch."""
    sizes = _Sizes(job, geometry, [stage])
    element, layer, outer = sizes.element, sizes.layer, sizes.outer
    everything = sizes.layers * sizes.local_layer + sizes.local_outer
    earlier = everything if geometry.accumulation_steps > 1 else 0
    kept = sizes.layers * sizes.kept_layer + sizes.rotary_tables
    weights = element * outer if sizes.loss.in_forward else 0
    yield Moment("loss", earlier, weights, kept + sizes.kept_head, sizes.loss.backward)
    grads = sizes.trained_layer
    root = element * (outer + sizes.trained_table)
    # The fp32 gradient of the output weight may be the gradient of the parameter.
    gathered = root + 2 * element * layer - (element * sizes.trained_table if sizes.loss.is_gradient else 0)
    yield Moment("head", earlier, gathered, kept + sizes.kept_head, sizes.loss.head)
    for done in {0, min(1, sizes.layers - 1), sizes.layers - 1}:
        # Gradients of reduced layers. The newest one is also still in its buffer.
        gradients = earlier or done * sizes.local_layer
        left, reduced = kept - done * sizes.kept_layer, FP32 * grads * min(1, done)
        gathered = root + element * (2 * layer + grads) + reduced
        yield Moment("backward", gradients, gathered, left, sizes.working)
        gathered = root + 2 * element * layer + FP32 * grads + reduced
        yield Moment("reduction", gradients, gathered, left - sizes.kept_layer)
    gradients = earlier or sizes.layers * sizes.local_layer
    yield Moment(
        "end", gradients, _reduction(sizes, element * sizes.trained_outer, sizes.trained_outer) + FP32 * grads
    )
    yield Moment("update", everything, working=sizes.update)


def pipeline_moments(
    job: JobConfig, geometry: ParallelDims, stages: Sequence[Stage], pp_rank: int
) -> Iterator[Moment]:
    """Yield the moments of a step of a rank with ``stages``, over all its microbatches."""
    sizes = _Sizes(job, geometry, stages)
    weights, gradients = sizes.element * sizes.whole, 0
    kept = [_kept_by_stage(sizes, stage) for stage in stages]
    alive, heads = 0.0, 0
    for is_forward, number in schedule_order(job.distributed, geometry.pp_microbatches, pp_rank):
        stage = stages[number]
        waiting = sizes.loss.kept * heads
        if is_forward:
            alive += kept[number]
            heads += stage.has_head
            if stage.has_head:
                yield Moment("loss", 0, weights + gradients, alive + waiting, sizes.loss.forward)
            continue
        if stage.has_head:
            heads -= 1
            others = waiting - sizes.loss.kept
            yield Moment("loss", 0, weights + gradients, alive + others, sizes.loss.backward)
            # The schedule keeps the output until the end of the backward pass.
            waiting = others + sizes.loss.output
            whole = weights + gradients
            whole += 0 if sizes.loss.is_gradient else sizes.element * sizes.trained_table
            yield Moment("head", 0, whole, alive + others, sizes.loss.head)
        first = FP32 * (sizes.trained_layer + (sizes.trained_outer if stage.has_head else 0))
        whole = weights + (gradients or first) + sizes.element * sizes.trained_layer
        if stage.has_head and sizes.element < FP32:
            whole += (
                sizes.element * sizes.trained_table
            )  # the root accumulates gradients after its backward pass
        yield Moment("backward", 0, whole, alive + waiting, sizes.working)
        gradients = FP32 * sizes.trained_whole
        alive -= kept[number]
        if stage.has_embedding:
            whole = weights + gradients + sizes.element * sizes.trained_table
            yield Moment("backward", 0, whole, alive + waiting)
    for held, group in ((sizes.outer, sizes.trained_outer), (sizes.layer, sizes.trained_layer)):
        rest = sizes.element * (sizes.whole - held) + FP32 * (sizes.trained_whole - group)
        yield Moment("end", 0, _reduction(sizes, FP32 * group, group) + rest)
    everything = sizes.layers * sizes.local_layer + sizes.local_outer
    yield Moment("update", everything, working=sizes.update)
    if job.eval.interval:
        yield _validation(sizes, stages, geometry.pp_microbatches)


def _validation(sizes: _Sizes, stages: Sequence[Stage], microbatches: int) -> Moment:
    """Return the moment of the last microbatch of a validation."""
    ends = sum((not stage.has_embedding) + (not stage.has_head) for stage in stages)
    has_head = any(stage.has_head for stage in stages)
    working = max(sizes.temporaries, sizes.loss.evaluation if has_head else 0)
    return Moment("validation", 0, sizes.element * sizes.whole, ends * microbatches * sizes.boundary, working)


def _kept_by_stage(sizes: _Sizes, stage: Stage) -> float:
    """Return the bytes that a microbatch keeps in a stage. Its input is counted as a receive buffer."""
    kept = len(stage.layers) * sizes.kept_layer + sizes.rotary_tables
    kept += sizes.kept_head if stage.has_head else sizes.boundary
    return kept - (0 if stage.has_embedding else sizes.boundary)


def _reduction(sizes: _Sizes, gradients: float, numel: int) -> float:
    """Return the peak bytes of reducing unsharded ``gradients``.

    They are copied to a buffer and reduced into another one. A single rank divides them in between.
    """
    buffer = FP32 * numel
    if sizes.shards == 1:
        return max(gradients + buffer, 3 * buffer)
    return max(gradients + buffer, buffer + buffer / sizes.shards)
