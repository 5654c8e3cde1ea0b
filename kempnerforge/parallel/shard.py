"""Shard a model on the meta device, then allocate and initialize it."""

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

    ``model`` is a whole model or a pipeline stage. ``mesh`` is made by
    ``distributed.mesh.build_mesh``. Parameter names do not change. Parameters, gradients and
    optimizer state are fp32. With "bf16", forward and backward use bf16 copies of the weights, and
    gradients are reduced in fp32.

    Gradients are **summed** over the ranks, never averaged: the loss is already divided by the
    tokens of the whole global batch, so the sum is exactly the gradient of the mean loss for any
    number of ranks.

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
        # Inputs are not cast: the embedding returns bf16 already, and the rotary tables must remain
        # fp32.
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    else:
        policy = MixedPrecisionPolicy()
    for module in (*blocks, model):
        # A stage computes many microbatches in turn. Its weights, like its gradients, remain
        # unsharded from the first forward to the end of the last backward.
        fully_shard(module, mesh=dp_mesh(mesh), mp_policy=policy, reshard_after_forward="pp" not in names)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # With only a factor, FSDP requests a scaled sum, which only NCCL supports.
            module.set_force_sum_reduction_for_comms(True)


def materialize(model: Llama, device: torch.device, *, seed: int | None) -> None:
    """Allocate and initialize a model that ``parallelize`` has sharded on the meta device.

    Every rank allocates and initializes its own shard only. With ``seed`` None the weights are left
    uninitialized, because they are about to be loaded. Not collective.
    """
    model.to_empty(device=device)
    if seed is None:
        reset_buffers_(model)
    else:
        init_weights_(model, seed=seed, init_std=model.config.init_std, n_layers=model.config.n_layers)
