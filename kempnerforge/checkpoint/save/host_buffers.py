"""Host buffers that are the images of shard files: allocated once, reused by every save.

An arena is anonymous shared memory, so that the writer process writes from it without a copy; on CUDA it is
registered once as pinned memory. Fresh pages cost ten times a copy into resident ones, which is why a save
after the first allocates nothing; huge ones cost the writer a tenth of the kernel's time.
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
"""Arenas made by this process so far: a test asserts that it stands still."""


class HostBuffer:
    """The image of one shard file in shared memory, pinned for ``device`` if there is one.

    Raises OSError and MemoryError for memory that there is not. Memory that cannot be pinned stays pageable.
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
        """Why it could not be pinned; empty if it is, or need not be."""
        if device is not None and not self.pin_error:
            # Not at exit: a process that ends gives everything back.
            closing.detach()
            self._close = weakref.finalize(self, _unpin_and_close, self._bytes, device, self.fd)
            self._close.atexit = False

    def views(self) -> list[tuple[str, Sizes, torch.Tensor]]:
        """Name, offsets and place of each chunk: a tensor of its dtype and shape in the arena's memory.

        In the order of their bytes.
        """
        found = []
        for place in self.image.order:
            item, begin = self.file.items[place].item, self.image.begins[place]
            raw = self._bytes[begin : begin + item.size_bytes]
            found.append((item.name, item.offsets, raw.view(DTYPES[item.dtype]).view(item.sizes)))
        return found

    def staged_bytes(self, copied: int) -> int:
        """How much of the file is there when the first ``copied`` of its views are filled."""
        if copied >= len(self.image.order):
            return self.image.size_bytes
        # The next one's first byte: what is before it is there.
        return self.image.begins[self.image.order[max(0, copied)]]

    def close(self) -> None:
        """Release the memory; no view may be used any more, by the device neither."""
        self._close()


def _unpin_and_close(memory: torch.Tensor, device: torch.device, fd: int) -> None:
    cuda.unpin(memory, device)
    os.close(fd)


class HostBuffers:
    """All arenas of one rank, and where each tensor goes."""

    def __init__(self, files: Sequence[PlannedFile], device: torch.device | None) -> None:
        self.arenas: list[HostBuffer] = []
        self._targets: list[list[tuple[str, Sizes, torch.Tensor]]] = []
        try:
            for file in files:
                self.arenas.append(HostBuffer(file, device))
                self._targets.append(self.arenas[-1].views())
        except BaseException:
            self.close()
            raise

    @property
    def pin_error(self) -> str:
        """Why an arena could not be pinned; empty if all are, or need not be."""
        return next((arena.pin_error for arena in self.arenas if arena.pin_error), "")

    @property
    def size_bytes(self) -> int:
        """Host memory that the arenas take."""
        return sum(padded(arena.image.size_bytes) for arena in self.arenas)

    def pairs(self, tensors: Mapping[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(place in an arena, this rank's part of a tensor) for everything that this rank writes.

        Raises ValueError when a tensor has changed since the plan was made.
        """
        with torch.no_grad():  # else every ``to_local`` makes a node of a graph
            return [
                (target, piece_at(name, tensors[name], offsets))
                for views in self._targets
                for name, offsets, target in views
            ]

    def staged_bytes(self, number: int, copied: int) -> int:
        """How much of an arena's file is there when the first ``copied`` of all ``pairs`` are."""
        return self.arenas[number].staged_bytes(copied - sum(map(len, self._targets[:number])))

    def close(self) -> None:
        """Release all arenas."""
        self._targets = []
        for arena in self.arenas:
            arena.close()


def needed_bytes(files: Sequence[PlannedFile]) -> int:
    """Return the host memory that an ``HostBuffers`` of ``files`` takes."""
    return sum(padded(plan_image(file.shard_items).size_bytes) for file in files)
