"""Tensor parallelism of the Llama-style decoder.

The matrices of each layer are sharded, and activations between them are sharded by position.

The method is that of Megatron-LM (arXiv:1909.08053) with sequence parallelism (arXiv:2205.05198).
In the attention and feed-forward modules a rank computes some of the heads and some of the
feed-forward width. Between these modules it computes some of the positions. Ranks communicate twice
per layer in the forward and twice in the backward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from kempnerforge.model.llama import Llama


def plan(model: Llama) -> dict[str, ParallelStyle]:
    """Return how each module of a model, or of a pipeline stage of one, is sharded.

    Every parameter becomes a DTensor of the mesh: sharded by rows (``wq``, ``wk``, ``wv``, ``w1``,
    ``w3``, the embedding and the output layer), sharded by columns (``wo``, ``w2``), or replicated
    (the norms). Inputs and outputs of blocks and stages are plain tensors: [B, T / ranks, D].
    Logits are DTensors sharded over the vocabulary, for a loss that is computed on the shards
    (``loss_parallel``). ``rules.tensor_parallel_fits`` rejects sizes that do not divide evenly.
    Only the vocabulary may have uneven shards.
    """
    styles: dict[str, ParallelStyle] = {}
    if model.tok_embeddings is not None:
        styles["tok_embeddings"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
    for name in model.layers:
        styles |= {f"layers.{name}.{part}": style for part, style in _block_plan().items()}
    if model.norm is not None:
        styles["norm"] = SequenceParallel()
    if model.output is not None:
        styles["output"] = ColwiseParallel(input_layouts=Shard(1), use_local_output=False)
    return styles


def finish(model: Llama, mesh: DeviceMesh) -> None:
    """Set up what a plan cannot express, after ``parallelize_module``."""
    if model.tok_embeddings is not None:
        # The output is a collective that may still run. When a compiled block gets it, torch 2.13
        # silently computes its gradient as zero. A copy waits for the collective and is a plain
        # tensor.
        model.tok_embeddings.register_forward_hook(lambda _module, _inputs, output: output.clone())
    if model.norm is not None and model.output is None:
        # A tied output layer is not a module whose input could be prepared.
        whole = PrepareModuleOutput(
            output_layouts=Shard(1), desired_output_layouts=Replicate(), use_local_output=False
        )
        parallelize_module(model.norm, mesh, whole)
    model.sequence_shards = mesh.size()


def _block_plan() -> dict[str, ParallelStyle]:
    """Return how the modules of one decoder layer are sharded."""
    return {
        "attention_norm": SequenceParallel(),
        "attention": PrepareModuleInput(
            input_layouts=(Shard(1), None, None),
            desired_input_layouts=(Replicate(), None, None),
        ),
        "attention.wq": ColwiseParallel(),
        "attention.wk": ColwiseParallel(),
        "attention.wv": ColwiseParallel(),
        "attention.wo": RowwiseParallel(output_layouts=Shard(1)),
        "ffn_norm": SequenceParallel(),
        "feed_forward": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "feed_forward.w1": ColwiseParallel(),
        "feed_forward.w2": RowwiseParallel(output_layouts=Shard(1)),
        "feed_forward.w3": ColwiseParallel(),
    }
