"""All that saving asks of CUDA beside copying: which device, on which thread, and pinned memory.

Without a tensor on a CUDA device nothing here touches CUDA: a context takes some 0.5 GB of a device.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from typing import Any

import torch

from kempnerforge.torch_compat import ShardedTensor

log = logging.getLogger("kempnerforge.checkpoint.cuda")


def device_of(tensors: Mapping[str, torch.Tensor]) -> torch.device | None:
    """Return the CUDA device that ``tensors`` are on; None if all are in host memory.

    Raises ValueError, naming a tensor on each, for several devices: copies are ordered by the streams of one.
    """
    found: dict[torch.device, str] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, ShardedTensor):
            parts = [shard.tensor for shard in tensor.local_shards()]
        else:
            parts = [tensor]
        for part in parts:
            if part.is_cuda:
                found.setdefault(part.device, name)
    if len(found) > 1:
        places = ", ".join(f"{name} is on {device}" for device, name in found.items())
        raise ValueError(
            f"{places}: what one process saves must be on one CUDA device. Move it there, or start a process "
            "for each device"
        )
    return next(iter(found), None)


def use(device: torch.device | None) -> None:
    """Make ``device`` this thread's. The first line of every thread that may touch an event or a stream.

    A new thread begins with device 0 whatever the main thread has set, and an event's first ``query`` there
    makes a context on it. Does nothing without a device.
    """
    if device is not None:
        torch.cuda.set_device(device)


def finish_stream(stream: torch.cuda.Stream | None, device: torch.device) -> None:
    """Wait until the device has done all that was queued on ``stream``. Any thread; raises nothing.

    None is the current stream. What failed on the device is raised where its result is used: here only the
    buffers matter, which the device no longer writes to after an error.
    """
    with contextlib.suppress(RuntimeError), torch.cuda.device(device):
        (stream or torch.cuda.current_stream(device)).synchronize()


def pin(memory: torch.Tensor, device: torch.device) -> str:
    """Register ``memory`` with CUDA as pinned. Returns why that failed; empty if it is pinned."""
    with torch.cuda.device(device):
        cudart: Any = torch.cuda.cudart()
        status = cudart.cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
        if int(status) == 0:
            return ""
        with contextlib.suppress(RuntimeError):
            # The runtime remembers the failed call, and the next kernel's launch check, whosever it is, would
            # raise it. This launch takes it away.
            torch.zeros(1, device=device)
    size_gb, why = memory.numel() / 1e9, cudart.cudaGetErrorString(status)
    return f"cudaHostRegister of {size_gb:.2f} GB failed with status {int(status)}: {why}"


def host_buffer(size_bytes: int, device: torch.device | None) -> torch.Tensor:
    """Return a new buffer in host memory: pinned for ``device`` if there is one and that works."""
    if device is not None:
        try:
            with torch.cuda.device(device):
                return torch.empty(size_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        except RuntimeError as error:
            log.warning("a buffer of %.1f MB is not pinned, reading is slower: %s", size_bytes / 1e6, error)
    return torch.empty(size_bytes, dtype=torch.uint8, device="cpu")


def unpin(memory: torch.Tensor, device: torch.device) -> None:
    """Take back ``pin``. Any thread; nothing may be copying."""
    with torch.cuda.device(device):
        cudart: Any = torch.cuda.cudart()
        status = int(cudart.cudaHostUnregister(memory.data_ptr()))
    if status:
        log.warning("cudaHostUnregister failed with status %d: its memory stays locked", status)
