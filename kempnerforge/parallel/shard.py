"""Shard a model on the meta device, then allocate and initialize it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from kempnerforge.distributed.mesh import dp_mesh
from kempnerforge.model.build import computes_loss, copy_requires_grad, repeated_blocks
from kempnerforge.model.init import reset_buffers_
from kempnerforge.model.recompute import recompute_activations
from kempnerforge.parallel.initial_weights import fill_buffers
from kempnerforge.parallel.tensor import tensor_parallel

if TYPE_CHECKING:
    from kempnerforge.config.schema import TrainConfig


def parallelize(model: nn.Module, mesh: DeviceMesh, train: TrainConfig) -> None:
    """Set up tensor parallelism, then activation checkpointing, then compilation, then FSDP2, in place.

    ``model`` is a whole model or a pipeline stage. ``mesh`` is made by
    ``distributed.mesh.build_mesh``. ``model.build.repeated_blocks`` are sharded, recomputed and
    compiled one by one. Parameter names do not change. Parameters, gradients and
    optimizer state are fp32. With "bf16", forward and backward use bf16 copies of the weights, and
    gradients are reduced in fp32.

    Gradients are **summed** over the ranks, never averaged: the loss is already divided by the
    tokens of the whole global batch, so the sum is exactly the gradient of the mean loss for any
    number of ranks.

    Collective: all ranks of ``mesh``.
    """
    names = mesh.mesh_dim_names or ()
    if "tp" in names:
        trained = {name: param.requires_grad for name, param in model.named_parameters()}
        tensor_parallel(model, mesh["tp"])
        copy_requires_grad(trained, model)
    blocks = repeated_blocks(model)
    for block in blocks:
        recompute_activations(block, train.activation_checkpointing)
        if train.compile_model:
            block.compile()
    if train.mixed_precision == "bf16":
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16,
            reduce_dtype=torch.float32,
            cast_forward_inputs=getattr(model, "cast_forward_inputs", True),
        )
    else:
        policy = MixedPrecisionPolicy()
    # What ``loss(batch)`` gets is not only inputs: bf16 would round targets and weights.
    keeps_inputs = dataclasses.replace(policy, cast_forward_inputs=False)
    for module in (*blocks, model):
        own_policy = keeps_inputs if module is model and computes_loss(model) else policy
        # A stage computes many microbatches in turn. Its weights, like its gradients, remain
        # unsharded from the first forward to the end of the last backward.
        fully_shard(module, mesh=dp_mesh(mesh), mp_policy=own_policy, reshard_after_forward="pp" not in names)
    if computes_loss(model):
        register_fsdp_forward_method(model, "loss")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # With only a factor, FSDP requests a scaled sum, which only NCCL supports.
            module.set_force_sum_reduction_for_comms(True)


def materialize(
    model: nn.Module,
    device: torch.device,
    *,
    seed: int | None = None,
    buffers: Mapping[str, Tensor] | None = None,
) -> None:
    """Allocate a model that ``parallelize`` has sharded on the meta device: each rank its shards only.

    Args:
        model: KempnerForge's own, or one of the user's.
        device: where to allocate it.
        seed: initialize the weights too, of a model that has ``init_shards_``. With None they
            are left uninitialized.
        buffers: the values of the buffers by name. With None, modules that have
            ``reset_buffers()`` recompute theirs.

    Not collective.
    """
    model.to_empty(device=device)
    if buffers is None:
        reset_buffers_(model)
    else:
        fill_buffers(model, buffers)
    if seed is not None:
        model.init_shards_(seed)  # type: ignore[operator]
