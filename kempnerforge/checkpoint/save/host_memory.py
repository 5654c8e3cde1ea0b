"""Check that there is memory for the host buffers of saves, on the machine and in every cgroup.

A container or a SLURM job has its own memory limit, set on its cgroup or on a parent of it. The
limit may be far below the free memory of the machine. When it is exceeded, the kernel kills a
process instead of refusing the memory.
"""

from __future__ import annotations

import os
import socket
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kempnerforge.errors import ConfigIssue
from kempnerforge.process_identity import boot_id

_SHARE = 0.9
"""Share of free memory to use: the data loader and the page cache need some too."""
_KEY = "checkpoint.max_host_memory_gb"


@dataclass(frozen=True)
class Limit:
    """A limit on the memory of a process: its machine, or a cgroup that it is in."""

    key: str
    """Equal for two ranks if and only if they share the limit."""
    name: str
    free_bytes: int
    """Memory that can still be allocated, including page cache that can be dropped."""


@dataclass(frozen=True)
class Claim:
    """How much memory one rank is about to allocate, and the limits that apply to it."""

    needed_bytes: int
    host: str
    limits: tuple[Limit, ...]
    """The first one is that of the machine."""


def claim(needed_bytes: int, *, proc: Path = Path("/proc")) -> Claim:
    """Return this rank's claim on ``needed_bytes``, which are not allocated yet."""
    host = socket.gethostname()
    # Not the host name: containers have their own, and two machines may have the same.
    machine = boot_id() or host
    limits = [Limit(machine, f"on {host}", _available_bytes(proc))]
    limits += [
        Limit(f"{machine} {key}", f"in the cgroup {folder} of {host}", free_bytes)
        for folder, key, free_bytes in _cgroup_limits(proc)
    ]
    return Claim(needed_bytes, host, tuple(limits))


def fault(claims: Sequence[Claim], limit_gb: float | None) -> ConfigIssue | None:
    """Return the problem with the claims of all ranks together; None if they fit.

    With ``limit_gb``, a limit for each machine, only that limit counts.
    """
    needed, free = _by_limit(claims if limit_gb is None else [_of_machine(one) for one in claims])
    if not free:
        return None
    if limit_gb is not None:
        most = max(needed, key=needed.__getitem__)
        needed_gb = needed[most] / 1e9
        if needed_gb <= limit_gb:
            return None
        return ConfigIssue(
            _KEY,
            f"the host buffers of the ranks {free[most].name} take {needed_gb:.2f} GB, more than {limit_gb}",
            f"at least {needed_gb:.2f}, or more nodes to share the state",
        )
    worst = max(free, key=lambda key: needed[key] - _SHARE * free[key].free_bytes)
    may_take = _SHARE * free[worst].free_bytes
    if needed[worst] <= may_take:
        return None
    return ConfigIssue(
        _KEY,
        f"the host buffers of the ranks {free[worst].name} take {needed[worst] / 1e9:.2f} GB, and about "
        f"{may_take / 1e9:.2f} GB are free there",
        "use more nodes, fewer ranks per node, or request more memory (sbatch --mem); or set a limit to try "
        "anyway",
    )


def largest_excess(claims: Sequence[Claim]) -> tuple[Limit, int] | None:
    """Return the limit that the claims of all ranks exceed most, and what they need; None if they fit."""
    needed, free = _by_limit(claims)
    worst = max(free, key=lambda key: needed[key] - free[key].free_bytes, default=None)
    if worst is None or needed[worst] <= free[worst].free_bytes:
        return None
    return free[worst], needed[worst]


def _by_limit(claims: Sequence[Claim]) -> tuple[dict[str, int], dict[str, Limit]]:
    """Return, by the key of each limit, what its ranks need together, and the limit with the least free."""
    needed: dict[str, int] = defaultdict(int)
    free: dict[str, Limit] = {}
    for rank_claim in claims:
        for limit in rank_claim.limits:
            needed[limit.key] += rank_claim.needed_bytes
            lowest = free.setdefault(limit.key, limit)
            if limit.free_bytes < lowest.free_bytes:
                free[limit.key] = limit
    return needed, free


def _of_machine(rank_claim: Claim) -> Claim:
    """Return the claim with the limit of the machine alone."""
    return replace(rank_claim, limits=rank_claim.limits[:1])


def _available_bytes(proc: Path) -> int:
    """Return the memory that can be allocated now without swapping. Raises OSError."""
    for line in (proc / "meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{proc}/meminfo has no MemAvailable")


def _cgroup_limits(proc: Path) -> Iterator[tuple[str, str, int]]:
    """Yield path, identity and free bytes of each cgroup of this process, or parent of one, with a limit.

    Skip limits that cannot be read, because they must not stop a run.
    """
    for version, mount, folder in _own_cgroups(proc):
        own = folder
        while folder.is_relative_to(mount):
            try:
                free_bytes = _free_v2(folder) if version == 2 else _free_v1(folder, is_own=folder == own)
                state = folder.stat()
            except (OSError, ValueError, KeyError):
                free_bytes, state = None, None
            if free_bytes is not None and state is not None:
                # Not the path: each container may see its own cgroup as the root. The inode number is unique.
                yield str(folder), f"{state.st_dev}:{state.st_ino}", free_bytes
            folder = folder.parent


def _own_cgroups(proc: Path) -> Iterator[tuple[int, Path, Path]]:
    """Yield version, mount point and folder of each hierarchy that accounts for this process's memory."""
    try:
        memberships = (proc / "self/cgroup").read_text().splitlines()
        mounts = (proc / "self/mountinfo").read_text().splitlines()
    except OSError:
        return
    for line in memberships:
        number, controllers, path = line.split(":", 2)
        is_v2 = number == "0" and not controllers
        if not is_v2 and "memory" not in controllers.split(","):
            continue
        for mount in mounts:
            before, _, after = mount.partition(" - ")
            kind, _, options = after.split(" ", 2)
            fits = kind == "cgroup2" if is_v2 else kind == "cgroup" and "memory" in options.split(",")
            if fits:
                root, point = (_unescaped(field) for field in before.split()[3:5])
                yield 2 if is_v2 else 1, Path(point), Path(point, _below(root, path))
                break


def _below(root: str, path: str) -> str:
    """Return ``path`` relative to the mount's ``root``; empty if it is not below it, as in a container."""
    inner = os.path.relpath(path, root)
    return "" if inner == "." or inner.startswith("..") else inner


def _unescaped(field: str) -> str:
    """Return a field of ``mountinfo`` without its escapes, such as ``\\040`` for a space."""
    return field.encode("latin-1", "replace").decode("unicode_escape") if "\\" in field else field


def _free_v2(folder: Path) -> int | None:
    """Return the free bytes of a cgroup of version 2; None without a limit. The root never has one."""
    limits = [_number(folder / name) for name in ("memory.max", "memory.high") if (folder / name).exists()]
    finite = [limit for limit in limits if limit is not None]
    if not finite:
        return None
    return _free_bytes(min(finite), folder / "memory.current", folder / "memory.stat", prefix="")


def _free_v1(folder: Path, *, is_own: bool) -> int | None:
    """Return the free bytes of a cgroup of version 1; None if no limit applies."""
    if not is_own and (folder / "memory.use_hierarchy").read_text().strip() == "0":
        return None
    limit = _number(folder / "memory.limit_in_bytes")
    if limit is None or limit >= 1 << 60:  # "no limit" is stored as the largest number of pages
        return None
    return _free_bytes(limit, folder / "memory.usage_in_bytes", folder / "memory.stat", prefix="total_")


def _free_bytes(limit: int, usage: Path, stat: Path, *, prefix: str) -> int:
    counts = dict(line.split() for line in stat.read_text().splitlines())
    # The kernel drops the file pages on both lists before it kills a process. Shared memory and tmpfs are on
    # neither list.
    cache = sum(int(counts[f"{prefix}{name}_file"]) for name in ("active", "inactive"))
    return max(0, limit - max(0, int(usage.read_text()) - cache))


def _number(path: Path) -> int | None:
    text = path.read_text().strip()
    return None if text == "max" else int(text)
