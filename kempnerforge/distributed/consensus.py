"""Decisions that all ranks make together, with a few collectives on a separate process group."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from kempnerforge.distributed.heartbeat import Heartbeat
from kempnerforge.distributed.timeouts import timeout_of
from kempnerforge.errors import KempnerForgeError
from kempnerforge.torch_compat import get_default_store

T = TypeVar("T")

_TIMEOUT_S = 1800.0
"""Used for a group whose backend has no time-out: torch's own default."""


class ControlGroup:
    """Agreement among the ranks of ``group``, a gloo group that nothing else uses.

    ``group`` is None for a single process. Every method is collective: all ranks of the group call
    it, in the same order. Raises ValueError for a group that does not serve the CPU, such as one of
    NCCL.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        if group is not None and torch.device("cpu") not in group._device_types:
            raise ValueError('the control group must serve the CPU: use dist.new_group(backend="gloo")')
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.num_ranks = dist.get_world_size(group) if group is not None else 1
        self._heartbeat: Heartbeat | None = None

    def agree(self, flags: Sequence[int]) -> list[int]:
        """Return the element-wise maximum of every rank's integers: one small reduction."""
        tensor = torch.tensor(flags, dtype=torch.int64, device="cpu")
        if self.group is not None:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor.tolist()

    def gather(self, value: T) -> list[T]:
        """Return every rank's ``value``, in the order of ranks."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(values, value, group=self.group)
        return values

    def run_on_rank0(self, work: Callable[[], T], *, brief: bool = False) -> T:
        """Run ``work`` on rank 0 and give its result, or its error, to every rank.

        Blocks: until rank 0 is done, for as long as ``work`` makes progress (see ``heartbeat``).
        Raises TimeoutError on the other ranks when ``work`` has made no progress for the group's
        time-out. ``brief`` says that ``work`` never blocks: the other ranks then wait in the
        broadcast itself, which is quicker.
        """
        outcome: list[Any]
        if self.group is None:
            outcome = _outcome_of(work)
        elif brief:
            outcome = _outcome_of(work) if self.rank == 0 else [None, None]
            dist.broadcast_object_list(outcome, group_src=0, group=self.group)
        else:
            outcome = self._share(self.group, work)
        if outcome[1] is not None:
            raise mark_collective(outcome[1])
        return outcome[0]

    def _share(self, group: dist.ProcessGroup, work: Callable[[], Any]) -> list[Any]:
        """Return the result and the error of rank 0's ``work`` on every rank."""
        timeout = timeout_of(group)
        timeout_s = timeout.total_seconds() if timeout is not None else _TIMEOUT_S
        if self._heartbeat is None:
            # The name is unique, because other objects may use this group, and the heartbeats of an
            # earlier run may have used this store.
            names: list[Any] = [secrets.token_hex(8)]
            dist.broadcast_object_list(names, group_src=0, group=group)
            store = PrefixStore(f"kempnerforge/heartbeat/{names[0]}", get_default_store())
            self._heartbeat = Heartbeat(store)
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            with self._heartbeat.working(timeout_s):
                outcome = _outcome_of(work)
        else:
            self._heartbeat.wait(timeout_s)
        dist.broadcast_object_list(outcome, group_src=0, group=group)
        return outcome

    def raise_on_any_error(self, error: Exception | None) -> None:
        """Raise on every rank when any rank has an error: its own, or else the lowest rank's."""
        shared = error if error is None or isinstance(error, KempnerForgeError) else repr(error)
        for rank, rank_error in enumerate(self.gather(shared)):
            if rank_error is None:
                continue
            if error is not None:
                raise mark_collective(error)
            raise (
                mark_collective(rank_error)
                if isinstance(rank_error, Exception)
                else RuntimeError(f"rank {rank}: {rank_error}")
            )


def _outcome_of(work: Callable[[], Any]) -> list[Any]:
    """Return [result, None], or [None, error] when ``work`` raises."""
    try:
        return [work(), None]
    except Exception as error:  # noqa: BLE001 - every rank must receive any error
        return [None, error]


def mark_collective(error: Exception) -> Exception:
    """Mark an error that all ranks are about to raise, so that only rank 0 prints it."""
    if isinstance(error, KempnerForgeError):
        error.agreed = True
    return error
