"""Explain an error of CUDA for lack of memory: what takes the memory, and a snapshot of the allocator.

Nothing here allocates device memory. The history of allocations is not recorded, because that
costs time in every step: the snapshot has the segments and blocks, without the stacks that made them.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kempnerforge import fsio
from kempnerforge.goodput.faults import FOLDER
from kempnerforge.torch_compat import memory_snapshot

_NUM_MODULES = 3
KINDS = ("parameters", "gradients", "optimizer state")


@dataclass(frozen=True)
class DeviceMemory:
    """The memory of a device, in bytes."""

    allocated: int
    """In use by tensors."""
    reserved: int
    """Held by the allocator, including ``allocated``."""
    free: int
    """Not used by any process."""
    total: int

    @classmethod
    def of(cls, device: torch.device) -> DeviceMemory | None:
        """Return the present values; None without CUDA."""
        if device.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info(device)
        return cls(torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device), free, total)


class MemoryHolders:
    """Measures which modules hold this rank's parameters, gradients and optimizer state.

    Args:
        parts: the parts of the model. Between steps: in a forward, FSDP has other parameters in
            the modules.
        optimizers: all optimizers of the run.
    """

    def __init__(self, parts: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._params = [
            (name or "(root)", param)
            for part in parts
            for name, module in part.named_modules()
            for param in module.parameters(recurse=False)
        ]
        self._optimizers = optimizers

    def measure(self) -> dict[str, dict[str, int]]:
        """Return module -> kind -> bytes. Memory that several tensors share is counted once."""
        by_module: dict[str, dict[str, int]] = {}
        counted: set[int] = set()
        for name, param in self._params:
            grads = [] if param.grad is None else [param.grad]
            states = [value for optimizer in self._optimizers for value in _state_of(optimizer, param)]
            of_module = by_module.setdefault(name, dict.fromkeys(KINDS, 0))
            for kind, tensors in zip(KINDS, ([param], grads, states), strict=True):
                of_module[kind] += _num_bytes(tensors, counted)
        return by_module


def describe(by_module: Mapping[str, Mapping[str, int]], memory: DeviceMemory | None) -> str:
    """Return one line: the totals, and the modules that hold the most."""
    by_kind = {kind: sum(kinds[kind] for kinds in by_module.values()) for kind in KINDS}
    totals, head = [f"{kind} {_size(num_bytes)}" for kind, num_bytes in by_kind.items()], ""
    if memory is not None:
        head = (
            f"{_size(memory.allocated)} allocated, {_size(memory.reserved)} reserved, "
            f"{_size(memory.free)} free of {_size(memory.total)}; "
        )
        rest = max(0, memory.allocated - sum(by_kind.values()))
        totals.append(f"the rest (activations, gathered weights, temporary tensors) {_size(rest)}")
    by_size = {name: sum(kinds.values()) for name, kinds in by_module.items()}
    largest = sorted(by_size, key=lambda name: -by_size[name])[:_NUM_MODULES]
    modules = ", ".join(f"{name} {_size(by_size[name])}" for name in largest)
    return f"{head}{', '.join(totals)}; largest modules: {modules}"


def explain(holders: MemoryHolders, device: torch.device, *, run_dir: Path, attempt: int, rank: int) -> str:
    """Return a line about the device memory of this rank, after it ran out. Never raises.

    On CUDA, write a snapshot of the allocator into the folder of faults.
    """
    try:
        line = describe(holders.measure(), DeviceMemory.of(device))
        if device.type == "cuda":
            path = run_dir / FOLDER / f"attempt_{attempt:05d}.rank_{rank:05d}.memory.pickle"
            fsio.make_folder(path.parent)
            with os.fdopen(fsio.open_file(path, os.O_WRONLY | os.O_TRUNC), "wb") as file:
                pickle.dump(memory_snapshot(), file)
            line = f"{line}. Snapshot for https://docs.pytorch.org/memory_viz: {path}"
    except Exception as error:  # noqa: BLE001 - an explanation must not hide the error itself
        line = f"what holds it is not known: {type(error).__name__}: {error}"
    return f"out of device memory on rank {rank}: {line}"


def _state_of(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> list[Any]:
    return list(optimizer.state[param].values()) if param in optimizer.state else []


def _num_bytes(tensors: Iterable[Any], counted: set[int]) -> int:
    total = 0
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            continue
        local = tensor.detach()
        storage = (local.to_local() if isinstance(local, DTensor) else local).untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in counted:
            counted.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def _size(num_bytes: int) -> str:
    gib = num_bytes / 2**30
    return f"{gib:.2f} GiB" if gib >= 0.1 else f"{num_bytes / 2**20:.2f} MiB"
