"""The time-out of collectives: one value for every process group.

``init_process_group`` sets the time-out of the default group only. ``new_group``, ``DeviceMesh``
and other code that makes a group without a time-out get the default of the backend: 30 minutes on
gloo, 10 on NCCL.
"""

from __future__ import annotations

import datetime

import torch
import torch.distributed as dist

from kempnerforge.torch_compat import c10d_world, set_group_timeout


def timeout_of(group: dist.ProcessGroup | None = None) -> datetime.timedelta | None:
    """Return how long collectives of ``group``, or of the default group, wait.

    For a group with several backends, this is the longest of their time-outs. It is None for a
    backend without this option.
    """
    group = group or dist.group.WORLD
    if group is None:
        return None
    timeouts = [_timeout_on(group, device) for device in group._device_types]
    return max((timeout for timeout in timeouts if timeout is not None), default=None)


def give_all_groups_the_default_timeout() -> None:
    """Set the time-out of every group of this process to that of the default group. Not collective.

    Call it after code that makes groups, such as ``init_device_mesh``. The time-out is not passed
    to the mesh itself: a mesh dimension with options gets its own communicator even where it spans
    the whole world, and on NCCL each communicator takes memory on every device.
    """
    timeout = timeout_of()
    if timeout is None:
        return
    for group in list(c10d_world.pg_map):
        if timeout_of(group) is not None:
            set_group_timeout(timeout, group)


def _timeout_on(group: dist.ProcessGroup, device: torch.device) -> datetime.timedelta | None:
    return getattr(getattr(group._get_backend(device), "options", None), "_timeout", None)
