"""Every private name that this package imports from torch, each with the reason.

All were tried with torch 2.13.0+cpu, the version that ``constraints.txt`` pins. Try them again when
that pin changes: torch may move or rename a private name in any release. A test rejects such an
import in any other module. Private attributes of torch's objects, such as
``ProcessGroup._get_backend``, are used where they are needed and are not listed here.
"""

from __future__ import annotations

# Snapshots of the allocator in the format of PyTorch's viewer. The documentation names it, but there
# is no public name. It was not tried on a GPU.
from torch.cuda.memory import _snapshot as memory_snapshot

# The result of a functional collective that may still run. There is no public type to test for.
from torch.distributed._functional_collectives import AsyncCollectiveTensor

# State dicts may contain ShardedTensors. DCP saves and loads the class, but it has no public path.
from torch.distributed._shard.sharded_tensor.api import ShardedTensor

# The function with which DCP puts a value under a path of a nested state dict. Structures that are
# loaded without a prepared target must be those that stock DCP builds.
from torch.distributed.checkpoint._traverse import set_element

# The store of the default process group: torch has no public way to get it. Messages that must not
# wait in a collective use it.
from torch.distributed.distributed_c10d import _get_default_store as get_default_store

# The setter of a group's time-out and the list of all groups: torch has no public way to either
# (2.11 to 2.13).
from torch.distributed.distributed_c10d import _set_pg_timeout as set_group_timeout
from torch.distributed.distributed_c10d import _world as c10d_world

# The local part of a DTensor that consists of several shards, as torchrec's tables do.
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

# The part of a DTensor that a rank holds. The public ``DTensor`` has its size but not its offsets.
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

# The placement of a dimension that both FSDP2 and tensor parallelism shard. The class has no public
# name.
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard

__all__ = [
    "AsyncCollectiveTensor",
    "LocalShardsWrapper",
    "ShardedTensor",
    "StridedShard",
    "c10d_world",
    "compute_local_shape_and_global_offset",
    "get_default_store",
    "memory_snapshot",
    "set_element",
    "set_group_timeout",
]
