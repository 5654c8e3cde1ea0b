"""How long ranks wait for each other in a collective: one value for every process group.

``init_process_group`` keeps its time-out for the default group alone. ``new_group``, ``DeviceMesh`` and
whatever else makes a group without naming one take the backend's own: 30 minutes on gloo, 10 on NCCL.
"""

from __future__ import annotations

import datetime

import torch
import torch.distributed as dist

# Private, and the only ones of this kind: the list of all groups, and the setter of a group's time-out. torch
# has no public way to either (2.11 to 2.13).
from torch.distributed.distributed_c10d import _set_pg_timeout, _world


def timeout_of(group: dist.ProcessGroup | None = None) -> datetime.timedelta | None:
    """Return how long collectives of ``group`` wait, of the default group without one.

    For a group with several backends, the longest. None for a backend that has no such option.
    """
    group = group or dist.group.WORLD
    if group is None:
        return None
    found = [_timeout_on(group, device) for device in group._device_types]
    return max((timeout for timeout in found if timeout is not None), default=None)


def give_all_groups_the_default_timeout() -> None:
    """Give every group that this process is in the time-out of the default group. Not collective.

    Call it after what makes groups, such as ``init_device_mesh``. The mesh is not told the time-out when it
    makes them: a dimension with options gets a communicator of its own even where it is the whole world, and
    on NCCL each one takes memory on every device.
    """
    timeout = timeout_of()
    if timeout is None:
        return
    for group in list(_world.pg_map):
        if timeout_of(group) is not None:
            _set_pg_timeout(timeout, group)


def _timeout_on(group: dist.ProcessGroup, device: torch.device) -> datetime.timedelta | None:
    return getattr(getattr(group._get_backend(device), "options", None), "_timeout", None)
