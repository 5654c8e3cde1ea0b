"""The one agreement a step: everything that all ranks must decide alike."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from kempnerforge.checkpoint.manager import CheckpointManager
from kempnerforge.distributed.control import ControlGroup
from kempnerforge.train.stop import StopSignals


@dataclass(frozen=True)
class Agreed:
    """What all ranks do after this step."""

    save: str | None
    """Why a save begins now; None when none does."""
    stop: str | None
    """Why the run stops now; None when it goes on."""


class Control:
    """Gathers each rank's wishes and gives all the same answer."""

    def __init__(self, group: ControlGroup, ckpt: CheckpointManager, signals: StopSignals) -> None:
        self._group = group
        self._ckpt = ckpt
        self._signals = signals

    def agree(self, step: int) -> Agreed:
        """Decide what follows ``step``.

        Collective: all ranks, on the control group. Blocks: until all ranks have finished the step.
        Raises SaveFailedError on all ranks after too many failed saves.
        """
        requested, self._signals.save_requested = self._signals.save_requested, False
        votes = self._ckpt.vote(requested=requested)
        stop, *agreed = self._group.agree([self._signals.received, *votes])
        reason = self._ckpt.decide(step, agreed)
        if stop:
            name = signal.Signals(stop).name
            return Agreed(save=f"stop: {name}", stop=name)
        return Agreed(save=reason, stop=None)
