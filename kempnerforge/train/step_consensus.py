"""The one agreement of all ranks after each step, about everything that they must decide alike."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from kempnerforge.checkpoint.manager import CheckpointManager
from kempnerforge.distributed.consensus import ControlGroup
from kempnerforge.train.hooks import HookSet
from kempnerforge.train.profile_request import Profiler
from kempnerforge.train.termination.stop_conditions import StopConditions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepDecision:
    """What all ranks do after this step."""

    save: str | None
    """Why a save begins now. None without a save."""
    stop: str | None
    """Why the run stops now. None when it continues."""
    profile: bool = False
    """Whether a profile was requested."""
    hook_failed: bool = False
    """Whether a hook of any rank has raised an exception, so that the run ends when the save is committed."""


class Control:
    """Combines the votes of all ranks into one decision."""

    def __init__(
        self,
        group: ControlGroup,
        ckpt: CheckpointManager,
        stopping: StopConditions,
        hooks: HookSet,
        profiler: Profiler,
    ) -> None:
        self._group = group
        self._ckpt = ckpt
        self.stopping = stopping
        self.hooks = hooks
        self.profiler = profiler

    def agree(self, step: int) -> StepDecision:
        """Decide what to do after ``step``.

        Collective: all ranks, on the control group. Blocks: until all ranks have finished the step.
        Raises SaveFailedError on all ranks after too many failed saves.
        """
        signals = self.stopping.signals
        requested, signals.save_requested = signals.save_requested, False
        votes = self._ckpt.collect_votes(requested=requested)
        own = [self._stop_vote(), self.hooks.vote(), self.profiler.vote()]
        stop, hook_failed, profile, *agreed = self._group.agree([*own, *votes])
        due = self._ckpt.apply_votes(step, agreed)
        reason = self.stopping.reason(stop, self._group)
        decision = StepDecision(save=due, stop=None, profile=bool(profile))
        if reason is not None:
            decision = StepDecision(save=f"stop: {reason}", stop=reason, hook_failed=bool(hook_failed))
        elif hook_failed:
            decision = StepDecision(save=due or self._ckpt.deferred_save, stop=None, hook_failed=True)
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
        stop, hook_failed = self._group.agree([self._stop_vote(), self.hooks.vote()])
        reason = self.stopping.reason(stop, self._group)
        save = f"stop: {reason}" if reason else None
        return StepDecision(save=save, stop=reason, hook_failed=bool(hook_failed))

    def _stop_vote(self) -> int:
        return self.stopping.vote(save_is_pending=self._ckpt.in_flight is not None)
