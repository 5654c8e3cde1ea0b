"""What all ranks agreed to write, and the buffers for it; made again when what a rank holds changes."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kempnerforge.checkpoint.arena import ArenaSet
from kempnerforge.checkpoint.commit import Expected, PlannedItem
from kempnerforge.checkpoint.plan import Signature, digest_of, held_chunks, make_plan, signature_of
from kempnerforge.distributed.control import ControlGroup
from kempnerforge.errors import SaveFailedError


class AgreedPlan:
    """The plan of one tree. A repeated save compares signatures, and takes one small reduction."""

    def __init__(self) -> None:
        self.arenas: ArenaSet | None = None
        self.expected: Expected | None = None
        """What all ranks write; on the first rank only, which commits."""
        self._signature: Signature | None = None
        self._held: list[PlannedItem] = []
        self._held_digest = ""
        self._agreed_digest = ""

    def look_at(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Find out what this rank holds of ``tensors``. Raises TypeError for what cannot be stored."""
        signature = signature_of(tensors)
        if signature is None or signature != self._signature:
            self._signature = None
            self._held = held_chunks(tensors)
            self._held_digest = digest_of(self._held)
            self._signature = signature

    def agree(self, control: ControlGroup, error: Exception | None, *, pin: bool) -> None:
        """Go on with the plan that there is, or make a new one and new buffers when any rank needs it.

        Collective: all ranks. ``error``: what kept this rank from getting so far; then TypeError or
        SaveFailedError, with rank and cause, is raised on all.
        """
        changed = self.arenas is None or self._held_digest != self._agreed_digest
        failed, changed = control.agree([error is not None, changed])
        if failed:
            _raise_on_all(control, error)
        if not changed:
            return
        everything = control.gather(self._held)
        plan = control.on_rank0(lambda: make_plan(everything))
        self.release()
        self.arenas = ArenaSet(plan.files[control.rank], pin=pin)
        self.expected = plan.expected if control.rank == 0 else None
        self._agreed_digest = self._held_digest

    def release(self) -> None:
        """Give the buffers back; the next agreement makes new ones."""
        if self.arenas is not None:
            self.arenas.close()
            self.arenas = None


def _raise_on_all(control: ControlGroup, error: Exception | None) -> None:
    """Raise on every rank: TypeError for a TypeError, SaveFailedError for the rest, with rank and cause."""
    clear = isinstance(error, (TypeError, SaveFailedError))
    text = "" if error is None else str(error) if clear else f"{type(error).__name__}: {error}"
    told = control.gather((isinstance(error, TypeError), text))
    rank, (is_type, text) = next((rank, one) for rank, one in enumerate(told) if one[1])
    raise TypeError(f"rank {rank}: {text}") if is_type else SaveFailedError(f"rank {rank}: {text}")
