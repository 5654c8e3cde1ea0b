"""Estimate the memory that a forward pass keeps for the backward pass.

The method follows Korthikanti et al. 2022 ("Reducing activation recomputation in large transformer
models", arXiv:2205.05198, section 4): sum up what autograd saves. The terms differ from the
paper's, because this decoder has SwiGLU, grouped-query heads, fused attention (no T x T matrix) and
no dropout. The table lists elements per token and layer. D is the model width, Q and K are the
total widths of query and key heads, F is the feed-forward width, and t is the number of
tensor-parallel ranks (with sequence parallelism):

=====================  =======================================================================================
checkpointing          kept
=====================  =======================================================================================
none                   2D/t inputs of the norms + 2D inputs of the matrix products, gathered over tp
                       + (2Q + 2K)/t attention's inputs and output + 4F/t around SwiGLU
none, compiled         as above with 3F/t: one result around SwiGLU is cheap and recomputed
selective              D/t the layer's input + (2Q + 2K + 2F)/t + 2D outputs of all matrix products
selective, compiled    as above with D instead of 2D: the last product is not needed
full                   D/t
=====================  =======================================================================================

An element has 2 bytes with "bf16" and 4 with "fp32". Attention adds an fp32 number per head, and
each norm adds one per token (as CUDA's fused kernel does; on the CPU, norms keep fp32 copies).
Tests compare the rows with autograd for t = 1. They test compiled layers on the CPU, where the
partitioner decides what is kept.
"""

from __future__ import annotations

from kempnerforge.config.model import ModelConfig
from kempnerforge.config.train import TrainConfig

FP32 = 4


def element_bytes(train: TrainConfig) -> int:
    """Return the bytes of one element of an activation."""
    return 2 if train.mixed_precision == "bf16" else 4


def kept_by_layer(model: ModelConfig, train: TrainConfig, tp: int) -> float:
    """Return the bytes per token and layer that are kept from the forward to the backward pass."""
    return _kept(model, train, tp, train.activation_checkpointing)


def working_set(model: ModelConfig, train: TrainConfig, tp: int) -> float:
    """Return the additional bytes per token in a layer's backward pass: recomputed values and gradients."""
    recomputed = _kept(model, train, tp, "none") - kept_by_layer(model, train, tp)
    return max(0.0, recomputed) + temporaries(model, train, tp)


def temporaries(model: ModelConfig, train: TrainConfig, tp: int) -> float:
    """Return the bytes per token of temporaries around SwiGLU, at their peak: three of width F, two of D.

    They are gradients in the backward pass, and results in a forward pass without gradients.
    """
    return element_bytes(train) * (3 * model.ffn_dim / tp + 2 * model.dim)


def kept_by_head(model: ModelConfig, train: TrainConfig, tp: int) -> float:
    """Return the bytes per token that the final norm and the output layer keep, without logits.

    They keep their inputs. ``chunked_cross_entropy`` drops the input of the output layer.
    """
    kept = model.dim / tp + (model.dim if train.chunk_tokens is None else 0)
    return element_bytes(train) * kept


def rotary_tables(model: ModelConfig) -> float:
    """Return the bytes per token of the rotary tables under a document mask, which all layers share.

    Each sequence has positions of its own. The mask itself has about a number per token.
    """
    return FP32 * model.resolved_head_dim


def hidden(model: ModelConfig, train: TrainConfig) -> float:
    """Return the bytes per token of the input of the output layer."""
    return element_bytes(train) * model.dim


def boundary(model: ModelConfig, train: TrainConfig, tp: int) -> float:
    """Return the bytes per token that a stage sends to the next."""
    return element_bytes(train) * model.dim / tp


def logits(model: ModelConfig, train: TrainConfig, tp: int) -> float:
    """Return the bytes per token of the logits, which tensor parallelism shards over the vocabulary."""
    return element_bytes(train) * -(-model.vocab_size // tp)


def log_probs(model: ModelConfig, tp: int) -> float:
    """Return the bytes per token of the log-probabilities. They and both gradients of the loss are fp32."""
    return 4 * -(-model.vocab_size // tp)


def chunk_working(model: ModelConfig, train: TrainConfig, tp: int) -> float:
    """Return the bytes per token of a chunk of ``chunked_cross_entropy``.

    These are fp32 logits, which become their gradient in place, and a copy of either in the dtype of
    the weights, if that is another one.
    """
    copies = element_bytes(train) % FP32
    return (FP32 + copies) * -(-model.vocab_size // tp)


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
    elements = 2 * dim / tp + 2 * dim + attention + (3 if compiled else 4) * hidden
    return element_bytes(train) * elements + statistics + 2 * 4 / tp
