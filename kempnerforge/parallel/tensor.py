"""Tensor parallelism: each layer's matrices over several ranks, and the activations between them by position.

Megatron-LM (arXiv:1909.08053) with sequence parallelism (arXiv:2205.05198): a rank has some heads and some of
the feed-forward width, and between those parts some of the positions. Ranks talk twice a layer each way.
"""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh
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

from kempnerforge.model.llama import Llama


def tensor_parallel(model: Llama, mesh: DeviceMesh) -> None:
    """Cut a model, or a pipeline stage of one, over the one-dimensional ``mesh``, in place.

    Every parameter becomes a DTensor of ``mesh``: rows of ``wq``, ``wk``, ``wv``, ``w1``, ``w3``, of the
    embedding and of the output layer, columns of ``wo`` and ``w2``, copies of the norms. What a block takes
    and gives, and what a stage gives to the next, is plain: [B, T / ranks, D]. Logits are DTensors, cut along
    the vocabulary, for a loss that is computed on the pieces (``loss_parallel``). What does not divide is
    refused by ``rules.tensor_parallel_fits``, except the vocabulary, whose pieces may be uneven.

    On a model on the meta device not collective.
    """
    plan: dict[str, ParallelStyle] = {}
    if model.tok_embeddings is not None:
        plan["tok_embeddings"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
    for name in model.layers:
        plan |= {f"layers.{name}.{part}": style for part, style in _block_plan().items()}
    if model.norm is not None:
        plan["norm"] = SequenceParallel()
    if model.output is not None:
        plan["output"] = ColwiseParallel(input_layouts=Shard(1), use_local_output=False)
    parallelize_module(model, mesh, plan)
    if model.tok_embeddings is not None:
        # What comes out is a collective that may still run. Given to a compiled block, torch 2.13 computes
        # its gradient as zero, without a word; a copy waits and is plain.
        model.tok_embeddings.register_forward_hook(lambda _module, _inputs, output: output.clone())
    if model.norm is not None and model.output is None:
        # The tied output layer is no module with an input of its own to prepare.
        whole = PrepareModuleOutput(
            output_layouts=Shard(1), desired_output_layouts=Replicate(), use_local_output=False
        )
        parallelize_module(model.norm, mesh, whole)
    model.sequence_shards = mesh.size()


def _block_plan() -> dict[str, ParallelStyle]:
    """How the parts of one decoder layer are cut."""
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
