"""How state tensors of an optimizer are laid out: like their parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from kempnerforge.checkpoint.format.dtypes import DTYPES
from kempnerforge.checkpoint.state.pieces import local_part
from kempnerforge.torch_compat import StridedShard, compute_local_shape_and_global_offset


def check_layout(name: str, value: torch.Tensor, parameter: torch.Tensor, key: str) -> None:
    """Raise TypeError for state of a sharded parameter that does not have the parameter's layout."""
    if isinstance(value, DTensor):
        placements = _placements(parameter, tuple(value.shape)) if not _is_count(value, key) else None
        if placements is None:
            raise TypeError(
                f"{name} is a DTensor of shape {tuple(value.shape)}, but its parameter has "
                f"{tuple(parameter.shape)}: only state of the parameter's shape, or with dimensions of size "
                "1 instead, can be resharded (docs/guide/optimizers.md)"
            )
        assert isinstance(parameter, DTensor)
        if value.placements != placements or value.device_mesh != parameter.device_mesh:
            raise TypeError(
                f"{name} is placed as {value.placements}, but its parameter as {parameter.placements}: "
                "only state that is placed like its parameter can be resharded (docs/guide/optimizers.md)"
            )
    elif isinstance(parameter, DTensor) and (
        value.ndim or (parameter.ndim == 0 and not _is_count(value, key))
    ):
        raise TypeError(
            f"{name} is a plain tensor of shape {tuple(value.shape)}, but its parameter is a DTensor: "
            "ranks may hold different values of it. Use an optimizer whose state consists of DTensors "
            "(docs/guide/optimizers.md)"
        )


def _placements(parameter: torch.Tensor, shape: tuple[int, ...]) -> tuple[Placement, ...] | None:
    """Return how state of a sharded parameter is placed: like the parameter.

    A dimension of size 1 instead of the parameter's, such as of a mean over it, is replicated. None
    for any other shape, and if the parameter is not sharded.
    """
    if not isinstance(parameter, DTensor) or len(shape) != parameter.ndim:
        return None
    if any(size not in (1, whole) for size, whole in zip(shape, parameter.shape, strict=True)):
        return None
    return tuple(
        Replicate()
        if isinstance(placement, (Shard, StridedShard))
        and shape[placement.dim] != parameter.shape[placement.dim]
        else placement
        for placement in parameter.placements
    )


def zeros_of_shape(
    parameter: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return zeros for state of ``shape``, sharded like the parameter if that is possible.

    ``shape`` is the parameter's, or has dimensions of size 1 instead. Not collective.
    """
    dtype = dtype or parameter.dtype
    placements = _placements(parameter, shape)
    if placements is None:
        return torch.zeros(shape, dtype=dtype, device=parameter.device)
    assert isinstance(parameter, DTensor)
    mesh = parameter.device_mesh
    sizes, _ = compute_local_shape_and_global_offset(torch.Size(shape), mesh, placements)
    local = torch.zeros(sizes, dtype=dtype, device=local_part(parameter).device)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def _is_count(value: torch.Tensor, key: str) -> bool:
    """Return whether this is a step counter, which is a plain tensor even for a 0-dim parameter."""
    return value.ndim == 0 and key == "step"


def make(
    parameter: torch.Tensor,
    key: str,
    head: tuple[str, tuple[int, ...]],
    group: Mapping[str, Any],
    on_host: frozenset[str] | None,
) -> torch.Tensor:
    """Create a state tensor as the optimizer would: like the parameter if the shapes are equal, else plain.

    ``head``: safetensors dtype and shape, from the index.
    """
    dtype, shape = DTYPES[head[0]], head[1]
    is_count = key == "step" and not shape
    if on_host is not None:
        host = key in on_host
    else:
        # Saved with parameters on the CPU, or by an old version: do as torch's load_state_dict.
        host = is_count and not (group.get("capturable") or group.get("fused"))
    if shape == tuple(parameter.shape) and not is_count and not host:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    if shape and not host and _placements(parameter, shape) is not None:
        return zeros_of_shape(parameter, shape, dtype)
    return torch.empty(shape, dtype=dtype, device="cpu" if host else parameter.device)
