"""The DeviceMesh of a layout."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


def build_mesh(device_type: str, *, dp_replicate: int, dp_shard: int) -> DeviceMesh:
    """Mesh over all ranks: ``("dp_shard",)`` for FSDP, ``("dp_replicate", "dp_shard")`` for HSDP.

    The innermost dimension has neighbouring ranks, so shards are gathered within a node and only gradients
    cross nodes under HSDP. Collective: all ranks.
    """
    assert dp_replicate * dp_shard == dist.get_world_size()
    if dp_replicate == 1:
        return init_device_mesh(device_type, (dp_shard,), mesh_dim_names=("dp_shard",))
    return init_device_mesh(
        device_type, (dp_replicate, dp_shard), mesh_dim_names=("dp_replicate", "dp_shard")
    )
