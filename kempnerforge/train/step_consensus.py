"""The one agreement of all ranks after each step, about everything that they must decide alike."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from kempnerforge.checkpoint.manager import CheckpointManager
from kempnerforge.distributed.consensus import ControlGroup
from kempnerforge.train.termination.stop_conditions import StopConditions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepDecision:
    """What all ranks do after this step."""

    save: str | None
    """Why a save begins now. None without a save."""
    stop: str | None
    """Why the run stops now. None when it continues."""


class Control:
    """Combines the votes of all ranks into one decision."""

    def __init__(self, group: ControlGroup, ckpt: CheckpointManager, stopping: StopConditions) -> None:
        self._group = group
        self._ckpt = ckpt
        self.stopping = stopping

    def agree(self, step: int) -> StepDecision:
        """Decide what to do after ``step``.

        Collective: all ranks, on the control group. Blocks: until all ranks have finished the step.
        Raises SaveFailedError on all ranks after too many failed saves.
        """
        signals = self.stopping.signals
        requested, signals.save_requested = signals.save_requested, False
        votes = self._ckpt.collect_votes(requested=requested)
        stop, *agreed = self._group.agree([self._stop_vote(), *votes])
        due = self._ckpt.apply_votes(step, agreed)
        reason = self.stopping.reason(stop, self._group)
        decision = StepDecision(save=due, stop=None)
        if reason is not None:
            decision = StepDecision(save=f"stop: {reason}", stop=reason)
        if decision.save is not None:
            log.debug("after step %d: %s, agreed votes %s, stop vote %d", step, decision, agreed, stop)
        return decision

    def query_stop(self, milliseconds: int) -> tuple[bool, int]:
        """Return whether to interrupt a validation, and the largest ``milliseconds`` of any rank.

        Collective: all ranks, on the control group, between the same two batches.
        """
        self.stopping.slice_ends()
        stop, slowest_ms = self._group.agree([self._stop_vote(), milliseconds])
        return stop != 0, slowest_ms

    def agree_to_stop(self) -> StepDecision:
        """Decide whether to stop when no save can be due: before the first step, or in a validation.

        Collective: all ranks, on the control group.
        """
        reason = self.stopping.reason(self._group.agree([self._stop_vote()])[0], self._group)
        return StepDecision(save=f"stop: {reason}" if reason else None, stop=reason)

    def _stop_vote(self) -> int:
        return self.stopping.vote(save_is_pending=self._ckpt.in_flight is not None)
