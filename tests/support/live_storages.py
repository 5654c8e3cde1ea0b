"""Measure the peak memory of the tensors of a piece of code. Each storage is counted once."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveStorages(TorchDispatchMode):
    """Adds up the bytes of all live storages after every operation, including those of the backward pass.

    It notices a storage when an operation takes or returns it, and keeps a weak reference. FSDP
    frees memory by resizing storages, so the size is read again whenever an operation takes the
    storage. Memory that a kernel allocates and frees itself is not seen. Tensors on the meta device
    are ignored.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}
        self._at_most = 0  # bytes that are alive, plus bytes freed since the last count
        self.peak = 0
        """Peak bytes since ``reset``."""
        self.peak_after = ""
        """The operation after which the peak was reached."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, then count, unless so few bytes were added that it cannot be the peak."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf)
        if self._at_most > self.peak and (alive := self._count()) > self.peak:
            self.peak, self.peak_after = alive, str(func)
        return result

    def reset(self) -> None:
        """Forget the peak, but not the storages."""
        self.peak, self.peak_after = 0, ""

    def _count(self) -> int:
        """Return the bytes of all live storages."""
        self._at_most = 0
        for key, (weak, _) in list(self._known.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(weak.cdata)
            if storage is None:
                del self._known[key]
            else:
                self._known[key] = (weak, storage.nbytes())
                self._at_most += storage.nbytes()
        return self._at_most

    def _add(self, tensor: torch.Tensor) -> None:
        if hasattr(tensor, "_local_tensor"):
            tensor = tensor._local_tensor  # pyright: ignore[reportAttributeAccessIssue]
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        # The address is not reused while there is a weak reference to it.
        known = self._known.get(storage._cdata)
        weak, size = known or (StorageWeakRef(storage), 0)
        if known is None or storage.nbytes() != size:
            self._known[storage._cdata] = (weak, storage.nbytes())
            self._at_most += max(0, storage.nbytes() - size)
