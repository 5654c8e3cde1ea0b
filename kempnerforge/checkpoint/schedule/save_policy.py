"""Decide when to save: small policies, each a pure function of a ``Moment``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from kempnerforge.config.schema import CheckpointConfig


@dataclass(frozen=True)
class Moment:
    """All input of a policy."""

    step: int
    """Optimizer steps done."""
    seconds_since_last_save: float = 0.0
    """By the clock of rank 0. Since the start of the attempt, if it has not saved yet."""
    bound_s: float = 0.0
    """An interval makes no save due earlier than this many seconds after the last save."""
    auto_s: float = math.inf
    """Seconds between saves under "auto". See ``auto_interval``."""
    requested: bool = False
    """Whether a user requested a save by a file or a signal."""


class Policy(Protocol):
    """One reason to save."""

    @property
    def reason(self) -> str:
        """The reason that the manifest of the save records."""
        ...

    def due(self, moment: Moment) -> bool:
        """Return whether to save after ``moment.step``."""
        ...


@dataclass(frozen=True)
class OnRequest:
    """A user requested the save."""

    reason: str = "requested"

    def due(self, moment: Moment) -> bool:
        """Return True while there is a request."""
        return moment.requested


@dataclass(frozen=True)
class FirstStep:
    """The initial weights."""

    reason: str = "first"

    def due(self, moment: Moment) -> bool:
        """Return True before the first step."""
        return moment.step == 0


@dataclass(frozen=True)
class ListedSteps:
    """Steps that the config lists."""

    steps: frozenset[int]
    reason: str = "listed"

    def due(self, moment: Moment) -> bool:
        """Return True at a listed step."""
        return moment.step in self.steps


@dataclass(frozen=True)
class PowersOfTwo:
    """Steps 1, 2, 4, 8 and so on from ``start`` to ``stop``, both included: early training dynamics."""

    start: int
    stop: int
    reason: str = "early_window"

    def due(self, moment: Moment) -> bool:
        """Return True at a power of two in the window."""
        step = moment.step
        return self.start <= step <= self.stop and step & (step - 1) == 0


@dataclass(frozen=True)
class EverySteps:
    """Multiples of ``interval``, but no earlier than ``bound_s`` after the last save."""

    interval: int
    reason: str = "interval"

    def due(self, moment: Moment) -> bool:
        """Return True at a multiple, except for step 0, which is for ``FirstStep``."""
        late_enough = moment.seconds_since_last_save >= moment.bound_s
        return moment.step > 0 and moment.step % self.interval == 0 and late_enough


@dataclass(frozen=True)
class EveryMinutes:
    """A limit on the work that can be lost, in minutes."""

    minutes: float
    reason: str = "minutes"

    def due(self, moment: Moment) -> bool:
        """Return True when the last save is ``minutes`` ago and a step has been done."""
        return moment.step > 0 and moment.seconds_since_last_save >= max(60 * self.minutes, moment.bound_s)


@dataclass(frozen=True)
class Auto:
    """An interval that is computed during training. See ``auto_interval``."""

    reason: str = "auto"

    def due(self, moment: Moment) -> bool:
        """Return True when the last save is ``auto_s`` seconds ago and a step has been done."""
        return moment.step > 0 and moment.seconds_since_last_save >= moment.auto_s


@dataclass(frozen=True)
class SavePolicy:
    """All policies of a config, the more specific ones first. The first one that is due gives the reason."""

    policies: tuple[Policy, ...]

    @classmethod
    def from_config(cls, config: CheckpointConfig) -> SavePolicy:
        """Return the policies of ``config``, except for the last step, which the end of the loop saves."""
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
        """Whether any save is planned. A user can request one in any case."""
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
        """Return the reason to save after ``step``; None if no save is due.

        The reasons are ``requested``, ``first``, ``listed``, ``early_window``, ``auto``, ``interval``
        and ``minutes``.

        A pure function: the same arguments give the same answer on every rank. The caller remembers
        a save that it defers.
        """
        moment = Moment(step, seconds_since_last_save, bound_s, auto_s, requested)
        return next((policy.reason for policy in self.policies if policy.due(moment)), None)
