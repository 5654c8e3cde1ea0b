"""An estimate of what a forward pass keeps for the backward pass.

The method is that of Korthikanti et al. 2022 ("Reducing activation recomputation in large transformer
models", arXiv:2205.05198, section 4): add up what autograd saves. The terms differ from theirs, because this
decoder has SwiGLU, grouped-query heads, fused attention (no T x T matrix) and no dropout. In elements a token
and layer, with D model width, Q and K widths of all query and all key heads, F feed-forward width, t
tensor-parallel ranks (with sequence parallelism) and [t > 1] one where there are several:

=====================  =======================================================================================
checkpointing          kept
=====================  =======================================================================================
none                   2D/t inputs of the norms + 2D inputs of the matrix products, gathered over tp
                       + (2Q + 2K)/t attention's inputs and output + 4F/t around SwiGLU
none, compiled         2D/t + 2D [t > 1] + (2Q + 2K)/t + 2F/t: what is cheap is computed again
selective              D/t the layer's input + (2Q + 2K + 2F)/t + 2D outputs of all matrix products
selective, compiled    as above with D in place of 2D: nothing needs the last product
full                   D/t
=====================  =======================================================================================

An element is 2 bytes under "bf16" and 4 under "fp32". Attention adds an fp32 number for every head, and each
norm one for every token (as CUDA's fused kernel does; on the CPU norms keep fp32 copies). The eager rows are
counted against autograd in tests for t = 1; what the compiler keeps is up to its partitioner, so the compiled
rows are what it may be expected to do.
"""

from __future__ import annotations

from kempnerforge.config.model import ModelConfig
from kempnerforge.config.train import TrainConfig


def element_bytes(train: TrainConfig) -> int:
    """Bytes of an activation."""
    return 2 if train.mixed_precision == "bf16" else 4


def kept_by_layer(model: ModelConfig, train: TrainConfig, tp: int) -> float:
    """Bytes a token and layer that are kept from the forward to the backward pass."""
    return _kept(model, train, tp, train.activation_checkpointing)


def working_set(model: ModelConfig, train: TrainConfig, tp: int) -> float:
    """Bytes a token on top, in the backward pass of one layer: what it computes again, and gradients."""
    again = _kept(model, train, tp, "none") - kept_by_layer(model, train, tp)
    return max(0.0, again) + temporaries(model, train, tp)


def temporaries(model: ModelConfig, train: TrainConfig, tp: int) -> float:
    """Bytes a token around SwiGLU, where most live at once: three of width F, and two of width D.

    In the backward pass they are gradients; in a forward pass without gradients, results.
    """
    return element_bytes(train) * (3 * model.ffn_dim / tp + 2 * model.dim)


def kept_by_head(model: ModelConfig, train: TrainConfig, tp: int) -> float:
    """Bytes a token that the last norm and the output layer keep, logits left out."""
    return element_bytes(train) * (model.dim / tp + model.dim)


def boundary(model: ModelConfig, train: TrainConfig, tp: int) -> float:
    """Bytes a token of what one stage hands to the next."""
    return element_bytes(train) * model.dim / tp


def logits(model: ModelConfig, train: TrainConfig, tp: int) -> float:
    """Bytes a token of the logits, cut over the vocabulary by tensor parallelism."""
    return element_bytes(train) * -(-model.vocab_size // tp)


def log_probs(model: ModelConfig, tp: int) -> float:
    """Bytes a token of the log-probabilities, which are fp32, as each of the two gradients of the loss is."""
    return 4 * -(-model.vocab_size // tp)


def _kept(model: ModelConfig, train: TrainConfig, tp: int, checkpointing: str) -> float:
    dim, hidden = model.dim, model.ffn_dim / tp
    attention = 2 * (model.n_heads + model.kv_heads) * model.resolved_head_dim / tp
    statistics = 4 * model.n_heads / tp
    compiled = train.compile_model
    if checkpointing == "full":
        return element_bytes(train) * dim / tp
    if checkpointing == "selective":
        elements = dim / tp + attention + 2 * hidden + (dim if compiled else 2 * dim)
        return element_bytes(train) * elements + statistics
    inputs = 2 * dim if tp > 1 or not compiled else 0
    elements = 2 * dim / tp + inputs + attention + (2 if compiled else 4) * hidden
    return element_bytes(train) * elements + statistics + 2 * 4 / tp
