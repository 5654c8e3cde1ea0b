"""Whether a node has the memory for the host buffers that saving needs."""

from __future__ import annotations

from pathlib import Path

from kempnerforge.errors import ConfigError, Fault

_SHARE = 0.9
"""Of what the system calls available: the data loader and the page cache live there too."""


def available_bytes() -> int:
    """Memory that the system could give now, without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")


def fault(needed_bytes: int, limit_gb: float | None) -> ConfigError | None:
    """The error for buffers that this node should not or cannot hold; None when they fit."""
    needed = f"the host buffers of this node's ranks take {needed_bytes / 1e9:.2f} GB"
    if limit_gb is not None:
        if needed_bytes <= limit_gb * 1e9:
            return None
        allowed = f"at least {needed_bytes / 1e9:.2f}, or more ranks to share the state"
        return ConfigError(
            [Fault("checkpoint.max_host_memory_gb", f"{needed}, more than {limit_gb}", allowed)]
        )
    free = _SHARE * available_bytes()
    if needed_bytes <= free:
        return None
    allowed = "use more nodes, fewer ranks a node, or set a limit to try all the same"
    problem = f"{needed}, and about {free / 1e9:.2f} GB are free"
    return ConfigError([Fault("checkpoint.max_host_memory_gb", problem, allowed)])
