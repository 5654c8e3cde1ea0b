"""Load into tensors whose elements share memory, such as expanded tensors."""

from __future__ import annotations

import torch

from kempnerforge.errors import MismatchError


class Shadows:
    """Separate tensors that are filled in place of targets whose elements share memory.

    ``copy`` checks that all values for one memory location are equal.
    """

    def __init__(self) -> None:
        self._made: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def of(self, name: str, target: torch.Tensor) -> torch.Tensor:
        """Return the tensor to fill: ``target``, or a new tensor that ``copy`` copies to it."""
        if target.is_contiguous() or not may_overlap(target):
            return target
        shadow = torch.empty(target.shape, dtype=target.dtype, device=target.device)
        self._made.append((name, target, shadow))
        return shadow

    def copy(self) -> None:
        """Copy the filled tensors to their targets.

        Raises MismatchError, which names the leaf, if a target cannot hold the values.
        """
        for name, target, shadow in self._made:
            first, source = target, shadow
            for dim, stride in enumerate(target.stride()):
                if stride == 0:
                    first, source = first.narrow(dim, 0, 1), source.narrow(dim, 0, 1)
            first.copy_(source)
            if not torch.equal(_bits(target), _bits(shadow)):
                raise MismatchError(
                    f"{name}: elements of the tensor to fill share memory (shape {tuple(target.shape)}, "
                    f"strides {target.stride()}), but the checkpoint has different values for them: use a "
                    "tensor without shared elements"
                )


def may_overlap(tensor: torch.Tensor) -> bool:
    """Return False if no two elements share memory, and True if some may."""
    if tensor.numel() == 0:
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
