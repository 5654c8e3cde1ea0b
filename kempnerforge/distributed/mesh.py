"""The DeviceMesh of a parallel layout."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from kempnerforge.distributed import timeouts


def build_mesh(device_type: str, *, dp_replicate: int, dp_shard: int, tp: int = 1, pp: int = 1) -> DeviceMesh:
    """Return a mesh over all ranks with the dimensions ``pp``, ``dp_replicate``, ``dp_shard`` and ``tp``.

    Dimensions of size 1 are omitted, except ``dp_shard``. The innermost dimension consists of
    neighbouring ranks, so that tensor parallelism, which communicates in every layer, remains
    within a node. FSDP gathers weights over the next dimension. Only gradients (HSDP) and
    activations between stages cross nodes. All groups of the mesh have the time-out of the default
    group.

    Collective: all ranks.
    """
    assert pp * dp_replicate * dp_shard * tp == dist.get_world_size()
    sizes = {"pp": pp, "dp_replicate": dp_replicate, "dp_shard": dp_shard, "tp": tp}
    used = {name: size for name, size in sizes.items() if size > 1 or name == "dp_shard"}
    mesh = init_device_mesh(device_type, tuple(used.values()), mesh_dim_names=tuple(used))
    timeouts.give_all_groups_the_default_timeout()
    return mesh


def dp_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Return the data-parallel submesh: ``("dp_shard",)``, or ``("dp_replicate", "dp_shard")`` for HSDP."""
    assert mesh.mesh_dim_names is not None
    names = tuple(name for name in ("dp_replicate", "dp_shard") if name in mesh.mesh_dim_names)
    return mesh if names == mesh.mesh_dim_names else mesh[names]
