"""From a model on the meta device to a sharded one with memory and weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from kempnerforge.distributed.mesh import dp_mesh
from kempnerforge.model.init import init_weights_, reset_buffers_
from kempnerforge.model.layers import TransformerBlock
from kempnerforge.model.llama import Llama
from kempnerforge.parallel.tensor import tensor_parallel

if TYPE_CHECKING:
    from kempnerforge.config.schema import TrainConfig


def parallelize(model: Llama, mesh: DeviceMesh, train: TrainConfig) -> None:
    """Set up tensor parallelism, then activation checkpointing, then compilation, then FSDP2, in place.

    ``model`` is whole, or a pipeline stage; ``mesh`` is ``distributed.mesh.build_mesh``'s. Parameter names
    stay what they are. Parameters, gradients and optimizer state are fp32; with "bf16" forward and backward
    see bf16 copies of the weights, and gradients are reduced in fp32.

    Gradients are **summed** over the ranks, never averaged: the loss is already divided by the tokens of the
    whole global batch, so the sum is the gradient of its mean, exactly, whatever the number of ranks.

    Collective: all ranks of ``mesh``.
    """
    names = mesh.mesh_dim_names or ()
    if "tp" in names:
        tensor_parallel(model, mesh["tp"])
    blocks = [block for block in model.layers.values() if isinstance(block, TransformerBlock)]
    for block in blocks:
        block.remat = train.activation_checkpointing
        if train.compile_model:
            block.compile()
    if train.mixed_precision == "bf16":
        # Inputs are not cast: the embedding gives bf16 already, and the rotary tables must stay fp32.
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    else:
        policy = MixedPrecisionPolicy()
    for module in (*blocks, model):
        # A stage computes many microbatches in turn: its weights stay whole from the first forward to the end
        # of the last backward, as its gradients do.
        fully_shard(module, mesh=dp_mesh(mesh), mp_policy=policy, reshard_after_forward="pp" not in names)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # With a factor alone FSDP asks for a scaled sum, which only NCCL knows.
            module.set_force_sum_reduction_for_comms(True)


def materialize(model: Llama, device: torch.device, *, seed: int | None) -> None:
    """Give a model that ``parallelize`` has sharded on the meta device its memory and its initial weights.

    Every rank allocates and draws its own shard only. ``seed`` is None for weights that are to be loaded:
    until then they hold anything. Not collective.
    """
    model.to_empty(device=device)
    if seed is None:
        reset_buffers_(model)
    else:
        init_weights_(model, seed=seed, init_std=model.config.init_std, n_layers=model.config.n_layers)
