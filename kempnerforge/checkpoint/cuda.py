"""CUDA functions for saves and loads: devices, threads and pinned memory. ``save.staging`` copies.

Without a tensor on a CUDA device nothing here initializes CUDA, whose context takes about 0.5 GB of
device memory.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from typing import Any

import torch

from kempnerforge.log_setup import THIS_RANK
from kempnerforge.torch_compat import ShardedTensor

log = logging.getLogger("kempnerforge.checkpoint.cuda")


def device_of(tensors: Mapping[str, torch.Tensor]) -> torch.device | None:
    """Return the CUDA device of ``tensors``; None if all are in host memory.

    Raises ValueError for several devices, naming a tensor on each: copies are ordered by the
    streams of one device.
    """
    name_by_device: dict[torch.device, str] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, ShardedTensor):
            parts = [shard.tensor for shard in tensor.local_shards()]
        else:
            parts = [tensor]
        for part in parts:
            if part.is_cuda:
                name_by_device.setdefault(part.device, name)
    if len(name_by_device) > 1:
        where = ", ".join(f"{name} is on {device}" for device, name in name_by_device.items())
        raise ValueError(
            f"{where}: all tensors that one process saves must be on one CUDA device. Move them to one, or "
            "start a process for each device"
        )
    return next(iter(name_by_device), None)


def use(device: torch.device | None) -> None:
    """Set the current device of this thread. Call it first in every thread that uses an event or a stream.

    A new thread begins with device 0, whatever the main thread has set, and the first ``query`` of
    an event there would create a context on device 0. None does nothing.
    """
    if device is not None:
        torch.cuda.set_device(device)


def finish_stream(stream: torch.cuda.Stream | None, device: torch.device) -> None:
    """Wait until the device has done all work queued on ``stream`` (None: the current one). Any thread.

    Raises nothing. An error of the device is raised where its result is used. Callers need only
    know that the device no longer writes to the buffers, and after an error it does not.
    """
    with contextlib.suppress(RuntimeError), torch.cuda.device(device):
        (stream or torch.cuda.current_stream(device)).synchronize()


def pin(memory: torch.Tensor, device: torch.device) -> str:
    """Register ``memory`` with CUDA as pinned. Return why that failed; empty if it is pinned."""
    with torch.cuda.device(device):
        cudart: Any = torch.cuda.cudart()
        status = cudart.cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
        if int(status) == 0:
            return ""
        with contextlib.suppress(RuntimeError):
            # CUDA keeps the error of the failed call, and the next kernel launch of any code would raise it.
            # This launch clears it.
            torch.zeros(1, device=device)
    size_gb, why = memory.numel() / 1e9, cudart.cudaGetErrorString(status)
    return f"cudaHostRegister of {size_gb:.2f} GB failed with status {int(status)}: {why}"


def host_buffer(size_bytes: int, device: torch.device | None) -> torch.Tensor:
    """Return a new buffer in host memory. Pin it if there is a ``device`` and pinning succeeds."""
    if device is not None:
        try:
            with torch.cuda.device(device):
                return torch.empty(size_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        except RuntimeError as error:
            text = f"a buffer of {size_bytes / 1e6:.1f} MB is not pinned; reading is slower: {error}"
            log.warning(text, extra=THIS_RANK)
    return torch.empty(size_bytes, dtype=torch.uint8, device="cpu")


def unpin(memory: torch.Tensor, device: torch.device) -> None:
    """Undo ``pin``. Any thread. No copy may be in progress."""
    with torch.cuda.device(device):
        cudart: Any = torch.cuda.cudart()
        status = int(cudart.cudaHostUnregister(memory.data_ptr()))
    if status:
        text = f"cudaHostUnregister failed with status {status}: the memory stays locked"
        log.warning(text, extra=THIS_RANK)
