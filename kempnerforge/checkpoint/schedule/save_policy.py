"""When to save: small policies, each a pure function of the step and, for one of them, of the clock."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from kempnerforge.config.schema import CheckpointConfig


@dataclass(frozen=True)
class Moment:
    """All that a policy may look at."""

    step: int
    """Optimizer steps done."""
    seconds_since_last_save: float = 0.0
    """By one clock for all ranks: rank 0's. Since the start of the attempt, if it has saved nothing yet."""
    bound_s: float = 0.0
    """Seconds that must lie between the last save and one that an interval makes due."""
    auto_s: float = math.inf
    """Seconds between saves as ``pace`` works them out."""
    requested: bool = False
    """Whether a user asked for a save: by a file, or by a signal."""


class Policy(Protocol):
    """One reason to save."""

    @property
    def reason(self) -> str:
        """What the manifest of such a save says."""
        ...

    def due(self, moment: Moment) -> bool:
        """Whether to save after ``moment.step``."""
        ...


@dataclass(frozen=True)
class OnRequest:
    """A user asked for it."""

    reason: str = "asked"

    def due(self, moment: Moment) -> bool:
        """True while the request stands."""
        return moment.requested


@dataclass(frozen=True)
class FirstStep:
    """The weights that training starts from."""

    reason: str = "first"

    def due(self, moment: Moment) -> bool:
        """True before the first step."""
        return moment.step == 0


@dataclass(frozen=True)
class ListedSteps:
    """Steps that the config lists."""

    steps: frozenset[int]
    reason: str = "listed"

    def due(self, moment: Moment) -> bool:
        """True at a listed step."""
        return moment.step in self.steps


@dataclass(frozen=True)
class PowersOfTwo:
    """Steps 1, 2, 4, 8 and so on from ``start`` to ``stop``, both included: early training dynamics."""

    start: int
    stop: int
    reason: str = "dynamics"

    def due(self, moment: Moment) -> bool:
        """True at a power of two in the window."""
        step = moment.step
        return self.start <= step <= self.stop and step & (step - 1) == 0


@dataclass(frozen=True)
class EverySteps:
    """Multiples of ``interval``; under a bound, those that are late enough."""

    interval: int
    reason: str = "interval"

    def due(self, moment: Moment) -> bool:
        """True at a multiple; step 0 is ``FirstStep``'s."""
        late_enough = moment.seconds_since_last_save >= moment.bound_s
        return moment.step > 0 and moment.step % self.interval == 0 and late_enough


@dataclass(frozen=True)
class EveryMinutes:
    """A bound on the work that can be lost, in time."""

    minutes: float
    reason: str = "minutes"

    def due(self, moment: Moment) -> bool:
        """True once the last save is ``minutes`` ago; a step must have been done since the start."""
        return moment.step > 0 and moment.seconds_since_last_save >= max(60 * self.minutes, moment.bound_s)


@dataclass(frozen=True)
class Auto:
    """A spacing that is worked out while training: see ``pace``."""

    reason: str = "auto"

    def due(self, moment: Moment) -> bool:
        """True once the last save is as long ago as ``pace`` wants; a step must have been done."""
        return moment.step > 0 and moment.seconds_since_last_save >= moment.auto_s


@dataclass(frozen=True)
class SavePolicy:
    """All reasons to save, the more particular first: the first one that holds is the reason given."""

    policies: tuple[Policy, ...]

    @classmethod
    def from_config(cls, config: CheckpointConfig) -> SavePolicy:
        """What ``config`` asks for. The last step is no policy's: whoever ends the loop knows it."""
        policies: list[Policy] = [OnRequest()]
        if config.save_first:
            policies.append(FirstStep())
        if config.at_steps:
            policies.append(ListedSteps(frozenset(config.at_steps)))
        if window := config.dyn_ckpt_window:
            policies.append(PowersOfTwo(window.start, window.stop))
        if config.interval == "auto":
            policies.append(Auto())
        elif config.interval:
            policies.append(EverySteps(config.interval))
        if config.interval_minutes is not None:
            policies.append(EveryMinutes(config.interval_minutes))
        return cls(tuple(policies))

    @property
    def plans_saves(self) -> bool:
        """Whether any save is planned; one may always be asked for."""
        return any(not isinstance(policy, OnRequest) for policy in self.policies)

    def due(
        self,
        step: int,
        *,
        seconds_since_last_save: float = 0.0,
        requested: bool = False,
        bound_s: float = 0.0,
        auto_s: float = math.inf,
    ) -> str | None:
        """Why to save after ``step``: ``asked``, ``first``, ``listed``, ``dynamics``, ``auto``, ``interval``
        or ``minutes``; None when no save is due.

        Pure: the same arguments give the same answer on every rank. A save that is put off stays the caller's
        to remember.
        """
        moment = Moment(step, seconds_since_last_save, bound_s, auto_s, requested)
        return next((policy.reason for policy in self.policies if policy.due(moment)), None)
