"""Decide which steps to keep, by small rules that are pure functions of what is on disk.

A decision depends on the committed steps, their metrics, pins and readers, but on nothing that a
restart would lose. The rules count only sound steps: those with correct manifest, file names and
sizes. Steps that look damaged or cannot be read are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # the command line imports pydantic only where it reads a config
    from kempnerforge.config.schema import CheckpointConfig


@dataclass(frozen=True)
class StepInfo:
    """What a decision depends on, for one committed step."""

    step: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    problem: str = ""
    """Why it does not look sound; empty if it does."""
    foreign: str = ""
    """The id of the other run that it belongs to; empty for a step of the folder's own run."""
    pin: str = ""
    """Who pinned it; empty if it is not pinned."""
    readers: tuple[str, ...] = ()
    """Its readers."""
    origin: tuple[str, int] | None = None
    """Run id and attempt in its manifest; None if unknown."""


@dataclass(frozen=True)
class KeepReason:
    """Why a step is kept."""

    rule: str
    """``newest``, ``last``, ``every``, ``milestone``, ``best``, ``pinned``, ``read``, ``foreign``
    (another run's) or ``problem``."""
    text: str


@dataclass(frozen=True)
class Verdict:
    """The decision on a step, which is deleted if there is no reason to keep it."""

    step: int
    reasons: tuple[KeepReason, ...]

    @property
    def keep(self) -> bool:
        """Whether to keep the step."""
        return bool(self.reasons)


class Rule(Protocol):
    """One way to choose steps to keep."""

    @property
    def name(self) -> str:
        """Name of its reasons."""
        ...

    def describe(self) -> str:
        """Return a description of what it keeps."""
        ...

    def keeps(self, sound: Sequence[StepInfo]) -> dict[int, str]:
        """Return step -> why it is kept. ``sound``: all sound steps, newest first."""
        ...


@dataclass(frozen=True)
class LastN:
    """Keep the newest steps."""

    count: int
    name: str = "last"

    def describe(self) -> str:
        """Return, for example, ``the last 3``."""
        return f"the last {self.count}"

    def keeps(self, sound: Sequence[StepInfo]) -> dict[int, str]:
        """Keep the first ``count``."""
        return {facts.step: f"among the last {self.count}" for facts in sound[: self.count]}


@dataclass(frozen=True)
class EveryNSteps:
    """Keep one of every ``interval`` steps for good: the first one at or after each multiple.

    Exact multiples are not enough, because saves can be deferred, fail, or be due by time.
    """

    interval: int
    name: str = "every"

    def describe(self) -> str:
        """Return, for example, ``one of every 1000 steps``."""
        return f"one of every {self.interval} steps"

    def keeps(self, sound: Sequence[StepInfo]) -> dict[int, str]:
        """Keep the lowest step between each multiple and the next.

        Before the first multiple, keep only step 0.
        """
        lowest = {
            facts.step // self.interval: facts.step for facts in sound
        }  # older steps are later in the list and win
        return {
            step: f"the first from {number * self.interval} on, of every {self.interval}"
            for number, step in lowest.items()
            if number > 0 or step == 0
        }


@dataclass(frozen=True)
class Milestones:
    """Keep for good the first step at or after each milestone in ``steps`` and before the next one."""

    steps: tuple[int, ...]
    name: str = "milestone"

    def describe(self) -> str:
        """Return, for example, ``milestones 10, 100``."""
        return f"milestones {', '.join(map(str, sorted(self.steps)))}"

    def keeps(self, sound: Sequence[StepInfo]) -> dict[int, str]:
        """Keep the lowest step between each milestone and the next."""
        kept = {}
        marks = sorted(self.steps)
        for mark, following in zip(marks, [*marks[1:], None], strict=True):
            reached = [f.step for f in sound if f.step >= mark and (following is None or f.step < following)]
            if reached:
                kept[min(reached)] = f"milestone {mark}"
        return kept


@dataclass(frozen=True)
class BestN:
    """Keep the ``count`` steps with the best values of a metric.

    Of equal values, the later step is better.
    """

    count: int
    metric: str
    mode: str
    """``min`` or ``max``."""
    name: str = "best"

    def describe(self) -> str:
        """Return, for example, ``the best 2 by eval/loss (min)``."""
        return f"the best {self.count} by {self.metric} ({self.mode})"

    def keeps(self, sound: Sequence[StepInfo]) -> dict[int, str]:
        """Keep the best steps that have the metric."""
        sign = 1 if self.mode == "min" else -1
        having = [facts for facts in sound if self.metric in facts.metrics]
        ranked = sorted(having, key=lambda facts: (sign * facts.metrics[self.metric], -facts.step))
        return {
            facts.step: f"among the best {self.count}: {self.metric} {facts.metrics[self.metric]:.6g}"
            for facts in ranked[: self.count]
        }


@dataclass(frozen=True)
class KeepPolicy:
    """All rules of a config. A step is kept if any rule keeps it."""

    rules: tuple[Rule, ...] = ()

    @classmethod
    def from_config(cls, config: CheckpointConfig) -> KeepPolicy:
        """Return the rules that ``config`` sets."""
        rules: list[Rule] = [LastN(config.keep_last_n)]
        if config.keep_every_n_steps is not None:
            rules.append(EveryNSteps(config.keep_every_n_steps))
        if config.keep_steps:
            rules.append(Milestones(tuple(config.keep_steps)))
        if config.keep_best_n is not None and config.best_metric is not None:
            rules.append(BestN(config.keep_best_n, config.best_metric, config.best_mode))
        return cls(tuple(rules))


def decide(steps: Iterable[StepInfo], policy: KeepPolicy) -> list[Verdict]:
    """Decide on each step, newest first. A pure function.

    Whatever the policy, it keeps the newest sound step, and steps that are pinned, being read, not
    sound, or another run's. The rules see only the run's own sound steps.
    """
    ordered = sorted(steps, key=lambda facts: facts.step, reverse=True)
    sound = [facts for facts in ordered if not facts.problem and not facts.foreign]
    found: dict[int, list[KeepReason]] = {facts.step: [] for facts in ordered}
    if sound:
        found[sound[0].step].append(KeepReason("newest", "the newest sound step"))
    for rule in policy.rules:
        for step, text in rule.keeps(sound).items():
            found[step].append(KeepReason(rule.name, text))
    for facts in ordered:
        if facts.pin:
            found[facts.step].append(KeepReason("pinned", facts.pin))
        found[facts.step] += [KeepReason("read", f"being read: {reader}") for reader in facts.readers]
        if facts.foreign:
            text = f"of another run, {facts.foreign}: left as it is"
            found[facts.step].append(KeepReason("foreign", text))
        if facts.problem:
            found[facts.step].append(KeepReason("problem", f"left as it is: {facts.problem}"))
    return [Verdict(step, tuple(reasons)) for step, reasons in found.items()]
