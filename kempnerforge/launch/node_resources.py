"""What this node offers: GPUs, CPU cores, and how many threads each rank should use."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path

THREADS = "OMP_NUM_THREADS"
MAX_THREADS = 8
"""More threads rarely help: what ranks compute on the CPU is small."""
_NO_DEVICES = ("", "-1", "NoDevFiles")


def count_gpus(environ: Mapping[str, str] = os.environ, dev: Path = Path("/dev")) -> int:
    """Return the number of NVIDIA GPUs that this process may use, without loading CUDA."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        # CUDA ignores everything from the first invalid entry on.
        return next((index for index, name in enumerate(names) if name in _NO_DEVICES), len(names))
    return sum(1 for path in dev.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))


def count_cores(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Return the number of cores that this process may use: by its affinity and by its cgroups' quotas."""
    return max(1, min([len(os.sched_getaffinity(0)), *_quotas(cgroups, own)]))


def threads_per_rank(cores: int, ranks: int) -> int:
    """Return the number of threads for each of ``ranks`` processes of a node.

    One core per rank is left to its other threads and processes, which read data and write
    checkpoints.
    """
    return min(MAX_THREADS, max(1, cores // ranks - 1))


def set_threads(environ: MutableMapping[str, str], ranks: int) -> str:
    """Set the number of threads of each of ``ranks`` processes in ``environ``, unless the user has.

    Return a message about it; empty if it was set already. Torch reads it when it is imported.
    """
    if THREADS in environ:
        return ""
    cores = count_cores()
    threads = threads_per_rank(cores, ranks)
    environ[THREADS] = str(threads)
    count = "1 thread" if threads == 1 else f"{threads} threads"
    processes = "1 process" if ranks == 1 else f"{ranks} processes"
    return f"{count} per process ({processes} on {cores} CPU cores); set {THREADS} to change it"


def _quotas(mount: Path, own: Path) -> Iterator[int]:
    """Yield the CPU quota, in whole cores, of each cgroup of this process that has one."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            top = mount
        elif "cpu" in controllers.split(","):
            top = mount / "cpu"
        else:
            continue
        folder = top / path.lstrip("/")
        # In a container, the path may be that of the host, and the mount is the container's own cgroup.
        for place in [folder, *folder.parents] if folder.is_dir() else [top]:
            if not place.is_relative_to(top):
                break
            cores = _quota(place)
            if cores is not None:
                yield max(1, math.floor(cores))


def _quota(folder: Path) -> float | None:
    """Return the quota of one cgroup in cores; None without one, or if it cannot be read."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        return None if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
