"""How much memory the tensors of a piece of a program hold at most, each storage counted once."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveStorages(TorchDispatchMode):
    """Adds up the bytes of all storages alive after every operation, those of the backward pass included.

    It sees a storage when an operation takes or returns it and holds on to it weakly. Sizes are read again
    after every operation, because FSDP frees memory by resizing storages. What a kernel allocates and frees
    itself is not seen, and tensors on the meta device are left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, StorageWeakRef] = {}
        self.peak = 0
        """Most bytes alive at once since ``reset``."""
        self.peak_after = ""
        """The operation after which they were."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, then count."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf)
        alive = self.alive()
        if alive > self.peak:
            self.peak, self.peak_after = alive, str(func)
        return result

    def reset(self) -> None:
        """Forget the peak, not the storages."""
        self.peak, self.peak_after = 0, ""

    def alive(self) -> int:
        """Bytes of all storages that are alive now."""
        return sum(self.sizes())

    def sizes(self) -> list[int]:
        """Bytes of each storage that is alive now."""
        sizes = []
        for key, weak in list(self._known.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(weak.cdata)
            if storage is None:
                del self._known[key]
            else:
                sizes.append(storage.nbytes())
        return sizes

    def _add(self, tensor: torch.Tensor) -> None:
        if hasattr(tensor, "_local_tensor"):
            tensor = tensor._local_tensor  # pyright: ignore[reportAttributeAccessIssue]
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known[storage._cdata] = StorageWeakRef(storage)
