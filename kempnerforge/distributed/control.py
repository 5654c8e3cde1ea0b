"""How ranks decide together: a few collectives on a group that nothing else uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from kempnerforge.errors import KempnerForgeError

T = TypeVar("T")


class ControlGroup:
    """Agreement among the ranks of ``group``, a gloo group of its own; None is one process alone.

    Every method is collective: all ranks of the group, in the same order. Raises ValueError for a group that
    does not serve the CPU, such as one of NCCL.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        if group is not None and torch.device("cpu") not in group._device_types:
            raise ValueError('the control group must serve the CPU: use dist.new_group(backend="gloo")')
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.num_ranks = dist.get_world_size(group) if group is not None else 1

    def agree(self, flags: Sequence[int]) -> list[int]:
        """Element-wise maximum of every rank's integers: one small reduction."""
        tensor = torch.tensor(flags, dtype=torch.int64, device="cpu")
        if self.group is not None:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor.tolist()

    def gather(self, value: T) -> list[T]:
        """Every rank's ``value``, by rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(values, value, group=self.group)
        return values

    def on_rank0(self, work: Callable[[], T]) -> T:
        """Run ``work`` on rank 0 and give its result, or its error, to every rank.

        Blocks: until rank 0 is done.
        """
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = work()
            except Exception as error:  # noqa: BLE001 - whatever it is, every rank must learn of it
                outcome[1] = error
        if self.group is not None:
            dist.broadcast_object_list(outcome, group_src=0, group=self.group)
        if outcome[1] is not None:
            raise as_agreed(outcome[1])
        return outcome[0]

    def raise_together(self, error: Exception | None) -> None:
        """Raise on every rank when any rank has an error: its own, or else the lowest rank's."""
        told = error if error is None or isinstance(error, KempnerForgeError) else repr(error)
        for rank, found in enumerate(self.gather(told)):
            if found is None:
                continue
            if error is not None:
                raise as_agreed(error)
            raise as_agreed(found) if isinstance(found, Exception) else RuntimeError(f"rank {rank}: {found}")


def as_agreed(error: Exception) -> Exception:
    """Mark an error that all ranks are about to raise, so that rank 0 alone tells it."""
    if isinstance(error, KempnerForgeError):
        error.agreed = True
    return error
