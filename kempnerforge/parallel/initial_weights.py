"""Initial weights of a model that is sharded: the same bits on every layout.

KempnerForge's own model draws each shard where it is needed (``init_shards_``). For a model of the
user's, rank 0 builds the whole model on the CPU, and every rank takes its shards from that. Other
ranks hold one whole tensor at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kempnerforge.config.schema import ModelConfig
from kempnerforge.distributed.consensus import ControlGroup
from kempnerforge.model.build import build_whole
from kempnerforge.model.sharding import local_box


@torch.no_grad()
def fill_buffers(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy ``values`` into the buffers of the same names. Not collective."""
    for name, buffer in module.named_buffers(remove_duplicate=False):
        _take_shard(buffer, values[name])


def init_weights_(
    parts: Sequence[nn.Module], config: ModelConfig, *, seed: int, names: Sequence[str], control: ControlGroup
) -> None:
    """Fill the parameters of ``parts``, this rank's parts of the model, with their initial values.

    Args:
        parts: sharded and allocated. Together, the parts of all ranks have all ``names``.
        names: the parameters of the whole model, the same on every rank.

    Collective: all ranks of ``control``. Blocks: until rank 0 has built the whole model, and each
    of its tensors was sent. Raises ConfigError on all ranks if it cannot be built.
    """
    if all(hasattr(part, "init_shards_") for part in parts):
        for part in parts:
            part.init_shards_(seed)  # type: ignore[operator]
        return
    whole: list[nn.Module] = []
    control.run_on_rank0(lambda: whole.append(build_whole(config, seed=seed)))
    sources = dict(whole[0].named_parameters()) if whole else {}
    targets = {name: param for part in parts for name, param in part.named_parameters()}
    shapes = control.run_on_rank0(lambda: {name: tuple(sources[name].shape) for name in names}, brief=True)
    for name in names:
        source = sources[name].detach().contiguous() if sources else torch.empty(shapes[name], device="cpu")
        if control.group is not None:
            dist.broadcast(source, group_src=0, group=control.group)
        if name in targets:
            _take_shard(targets[name], source)


@torch.no_grad()
def _take_shard(target: Tensor, whole: Tensor) -> None:
    """Copy this rank's part of ``whole`` into ``target``."""
    local = target.to_local() if isinstance(target, DTensor) else target
    box = local_box(target)
    slices = tuple(slice(start, start + length) for start, length in zip(box.start, box.shape, strict=True))
    local.copy_(whole[slices])
