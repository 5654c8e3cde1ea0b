"""Host buffers, one for each shard file: allocated once, reused by every save.

A buffer holds the image of its file: all bytes as they will be on disk. It is anonymous shared
memory, so that the writer process writes from it without a copy. On CUDA it is registered once as
pinned memory. A copy into new pages takes ten times as long as one into resident pages, so saves
after the first allocate nothing. With huge pages a write takes a tenth of the kernel time.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence

import torch
import xxhash

from kempnerforge.checkpoint import cuda
from kempnerforge.checkpoint.format.dtypes import DTYPES
from kempnerforge.checkpoint.format.safetensors_file import ShardLayout, plan_image
from kempnerforge.checkpoint.save.commit import PlannedFile
from kempnerforge.checkpoint.save.direct_io import padded
from kempnerforge.checkpoint.save.shared_memory import map_new
from kempnerforge.checkpoint.state.pieces import Sizes, piece_at

allocations = 0
"""Buffers that this process has made. A test asserts that later saves make none."""


class HostBuffer:
    """The image of one shard file in shared memory, pinned for ``device`` if there is one.

    Raises OSError and MemoryError when there is not enough memory. If the memory cannot be pinned,
    it is used unpinned.
    """

    def __init__(self, file: PlannedFile, device: torch.device | None) -> None:
        global allocations
        allocations += 1
        self.file = file
        self.image: ShardLayout = plan_image(file.shard_items)
        self.fd = os.memfd_create(f"kempnerforge-{file.name}")
        closing = self._close = weakref.finalize(self, os.close, self.fd)
        os.ftruncate(self.fd, padded(self.image.size_bytes))
        memory = map_new(self.fd, padded(self.image.size_bytes))
        memory[: len(self.image.header)] = self.image.header
        self.header_digest = xxhash.xxh3_128_hexdigest(self.image.header)
        self._bytes = torch.frombuffer(memory, dtype=torch.uint8)
        self.pin_error = cuda.pin(self._bytes, device) if device is not None else ""
        """Why it could not be pinned; empty if it is pinned, or there is no device."""
        if device is not None and not self.pin_error:
            # Not at exit: the system frees the memory of a process that ends.
            closing.detach()
            self._close = weakref.finalize(self, _unpin_and_close, self._bytes, device, self.fd)
            self._close.atexit = False

    def views(self) -> list[tuple[str, Sizes, torch.Tensor]]:
        """Return name, offsets and view of each chunk, in the order of their bytes.

        A view is a tensor of the chunk's dtype and shape in the memory of the buffer.
        """
        views = []
        for index in self.image.order:
            item, begin = self.file.items[index].item, self.image.begins[index]
            raw = self._bytes[begin : begin + item.size_bytes]
            views.append((item.name, item.offsets, raw.view(DTYPES[item.dtype]).view(item.sizes)))
        return views

    def staged_bytes(self, copied: int) -> int:
        """Return how many bytes of the file are final when the first ``copied`` views are filled."""
        if copied >= len(self.image.order):
            return self.image.size_bytes
        # All bytes before the next view are final.
        return self.image.begins[self.image.order[max(0, copied)]]

    def close(self) -> None:
        """Release the memory. Neither this process nor the device may use a view afterwards."""
        self._close()


def _unpin_and_close(memory: torch.Tensor, device: torch.device, fd: int) -> None:
    cuda.unpin(memory, device)
    os.close(fd)


class HostBuffers:
    """All buffers of one rank, and the view that each tensor is copied to."""

    def __init__(self, files: Sequence[PlannedFile], device: torch.device | None) -> None:
        self.buffers: list[HostBuffer] = []
        self._targets: list[list[tuple[str, Sizes, torch.Tensor]]] = []
        try:
            for file in files:
                self.buffers.append(HostBuffer(file, device))
                self._targets.append(self.buffers[-1].views())
        except BaseException:
            self.close()
            raise

    @property
    def pin_error(self) -> str:
        """Why a buffer could not be pinned; empty if all are pinned, or there is no device."""
        return next((buffer.pin_error for buffer in self.buffers if buffer.pin_error), "")

    @property
    def size_bytes(self) -> int:
        """Host memory that the buffers take."""
        return sum(padded(buffer.image.size_bytes) for buffer in self.buffers)

    def pairs(self, tensors: Mapping[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return (view in a buffer, this rank's part of a tensor) for all that this rank writes.

        Raises ValueError when a tensor has changed since the plan was made.
        """
        with torch.no_grad():  # else every ``to_local`` adds a node to the autograd graph
            return [
                (target, piece_at(name, tensors[name], offsets))
                for views in self._targets
                for name, offsets, target in views
            ]

    def staged_bytes(self, number: int, copied: int) -> int:
        """Return how many bytes of a buffer are final when the first ``copied`` of all pairs are copied."""
        return self.buffers[number].staged_bytes(copied - sum(map(len, self._targets[:number])))

    def release_frozen(self) -> None:
        """Release the buffers of files with frozen tensors only, which come after all others."""
        kept = [number for number, buffer in enumerate(self.buffers) if not buffer.file.frozen]
        released = [buffer for buffer in self.buffers if buffer.file.frozen]
        self.buffers = [self.buffers[number] for number in kept]
        self._targets = [self._targets[number] for number in kept]
        for buffer in released:
            buffer.close()

    def close(self) -> None:
        """Release all buffers."""
        self._targets = []
        for buffer in self.buffers:
            buffer.close()


def needed_bytes(files: Sequence[PlannedFile]) -> int:
    """Return the host memory that ``HostBuffers`` for ``files`` takes."""
    return sum(padded(plan_image(file.shard_items).size_bytes) for file in files)
