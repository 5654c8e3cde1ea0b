"""Memory of a loss on a rank with the output layer, for one microbatch.

``cross_entropy`` keeps fp32 log-probabilities of all tokens from its forward to its backward pass,
and a pipeline keeps the logits too. The backward pass has two gradients of their size, then the
gradient of the logits.

``chunked_cross_entropy`` holds the logits of one chunk. From its forward to its backward pass it
keeps the fp32 gradients of the hidden states and of the output weight. If it recomputes, it keeps
the hidden states instead.

A loss of the user's is counted as ``cross_entropy``.
"""

from __future__ import annotations

from dataclasses import dataclass

from kempnerforge.config.job import JobConfig
from kempnerforge.plan import activations

FP32 = 4


@dataclass(frozen=True)
class LossMemory:
    """Bytes in addition to activations and gathered weights."""

    forward: float
    """Peak of the forward pass, including ``kept``."""
    kept: float
    """Kept from the forward to the backward pass, including ``output``."""
    backward: float
    """Peak of the backward pass of the loss itself; of the forward pass if that computes gradients."""
    head: float
    """Peak when the gradients reach the output layer."""
    output: float
    """The output of the last stage, which a pipeline's schedule keeps to the end. 0 without a pipeline."""
    evaluation: float
    """Peak of a forward pass without gradients."""
    in_forward: bool
    """Whether the model computes the loss, while its weights are gathered."""
    is_gradient: bool
    """Whether ``head`` includes the gradient of the output weight."""


def loss_memory(job: JobConfig, tp: int, tokens: int, table: int) -> LossMemory:
    """Return the memory for ``tokens``. ``table`` is the number of elements of the gathered output weight."""
    output = 0.0
    model, train = job.model, job.train
    element = activations.element_bytes(train)
    if train.chunk_tokens is None:
        logits = tokens * activations.logits(model, train, tp)
        log_probs = tokens * activations.log_probs(model, tp)
        forward = logits + log_probs * (2 if element < FP32 else 1)
        if job.distributed.pp > 1:
            output = logits
        # The z-loss keeps the logits, or has their gradient, at the peak.
        z_loss = logits if train.z_loss else 0
        return LossMemory(
            forward=forward,
            kept=logits + log_probs,
            backward=output + 3 * log_probs + z_loss,
            head=output + logits,
            output=output,
            evaluation=forward,
            in_forward=False,
            is_gradient=False,
        )
    hidden = tokens * activations.hidden(model, train)
    chunk = min(tokens, train.chunk_tokens) * activations.chunk_working(model, train, tp)
    # The output of the final norm, and what tensor parallelism gathers from it.
    inputs = hidden + (hidden / tp if tp > 1 else 0)
    if job.distributed.pp > 1:
        output = hidden / tp
    gradients = FP32 * (tokens * model.dim + table)
    converted = element * (tokens * model.dim + table) if element < FP32 else 0
    recomputed = train.loss_is_recomputed(job.distributed.pp_schedule)
    return LossMemory(
        forward=inputs + chunk + (0 if recomputed else gradients),
        kept=inputs if recomputed else output + gradients,
        backward=inputs + chunk + gradients,
        head=(inputs if recomputed else output) + gradients + converted,
        output=output,
        evaluation=inputs + chunk,
        in_forward=True,
        is_gradient=True,
    )
