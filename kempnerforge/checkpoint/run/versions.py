"""Describe the software and hardware that write a checkpoint."""

from __future__ import annotations

import platform

import torch

from kempnerforge import __version__


def versions(device: torch.device) -> dict[str, str]:
    """Return the versions and hardware that bitwise equality depends on."""
    found = {
        "kempnerforge": __version__,
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "machine": platform.machine(),
    }
    if device.type == "cuda":
        from torch.cuda import nccl

        found["device"] = torch.cuda.get_device_name(device)
        found["cuda"] = str(torch.version.cuda)
        found["nccl"] = ".".join(map(str, nccl.version()))
    else:
        found["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    return found
