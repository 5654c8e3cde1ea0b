"""What to keep: small rules, each a pure function of what is on disk.

A decision looks at committed steps, the metrics in their manifests, pins and readers, and at nothing that a
restart would lose. Only sound steps are counted (manifest, names and sizes are right); what looks damaged,
or cannot be read, is not retention's to judge and stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # the command line pays for pydantic only where it reads a config
    from kempnerforge.config.schema import CheckpointConfig


@dataclass(frozen=True)
class StepInfo:
    """What a decision looks at, of one committed step."""

    step: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    problem: str = ""
    """Why it does not look sound; empty when it does."""
    foreign: str = ""
    """The id of the other run that it is of; empty for a step of the folder's own run."""
    pin: str = ""
    """Who pinned it; empty when nobody did."""
    readers: tuple[str, ...] = ()
    """Who reads it now."""
    origin: tuple[str, int] | None = None
    """Run id and attempt by its manifest; None when that cannot tell."""


@dataclass(frozen=True)
class KeepReason:
    """Why a step is kept."""

    rule: str
    """``newest``, ``last``, ``every``, ``milestone``, ``best``, ``pinned``, ``read``, ``foreign`` (another
    run's) or ``problem``."""
    text: str


@dataclass(frozen=True)
class Verdict:
    """What becomes of a step: it goes when there is no reason to keep it."""

    step: int
    reasons: tuple[KeepReason, ...]

    @property
    def keep(self) -> bool:
        """Whether the step stays."""
        return bool(self.reasons)


class Rule(Protocol):
    """One way to choose steps to keep."""

    @property
    def name(self) -> str:
        """Of the reasons that it gives."""
        ...

    def describe(self) -> str:
        """What it keeps, in words."""
        ...

    def keeps(self, sound: Sequence[StepInfo]) -> dict[int, str]:
        """Step -> why it is kept. ``sound`` has all sound steps, newest first."""
        ...


@dataclass(frozen=True)
class LastN:
    """The newest ones."""

    count: int
    name: str = "last"

    def describe(self) -> str:
        """Such as ``the last 3``."""
        return f"the last {self.count}"

    def keeps(self, sound: Sequence[StepInfo]) -> dict[int, str]:
        """The first ``count``."""
        return {facts.step: f"among the last {self.count}" for facts in sound[: self.count]}


@dataclass(frozen=True)
class EveryNSteps:
    """For ever one step of every ``interval``: the first one at or after each multiple.

    Not only multiples, because saves can be put off, fail, or go by the clock.
    """

    interval: int
    name: str = "every"

    def describe(self) -> str:
        """Such as ``one of every 1000 steps``."""
        return f"one of every {self.interval} steps"

    def keeps(self, sound: Sequence[StepInfo]) -> dict[int, str]:
        """The lowest step of each window from a multiple to the next; before the first, step 0 alone."""
        lowest = {facts.step // self.interval: facts.step for facts in sound}  # older ones come later and win
        return {
            step: f"the first from {number * self.interval} on, of every {self.interval}"
            for number, step in lowest.items()
            if number > 0 or step == 0
        }


@dataclass(frozen=True)
class Milestones:
    """For ever the first step at or after each of ``steps``, and before the next of them."""

    steps: tuple[int, ...]
    name: str = "milestone"

    def describe(self) -> str:
        """Such as ``milestones 10, 100``."""
        return f"milestones {', '.join(map(str, sorted(self.steps)))}"

    def keeps(self, sound: Sequence[StepInfo]) -> dict[int, str]:
        """The lowest step from each milestone to the next."""
        kept = {}
        marks = sorted(self.steps)
        for mark, following in zip(marks, [*marks[1:], None], strict=True):
            reached = [f.step for f in sound if f.step >= mark and (following is None or f.step < following)]
            if reached:
                kept[min(reached)] = f"milestone {mark}"
        return kept


@dataclass(frozen=True)
class BestN:
    """The ``count`` best values of a metric among the steps that have it; of equal ones the later step."""

    count: int
    metric: str
    mode: str
    """``min`` or ``max``."""
    name: str = "best"

    def describe(self) -> str:
        """Such as ``the best 2 by eval/loss (min)``."""
        return f"the best {self.count} by {self.metric} ({self.mode})"

    def keeps(self, sound: Sequence[StepInfo]) -> dict[int, str]:
        """The best ones, with their values."""
        sign = 1 if self.mode == "min" else -1
        having = [facts for facts in sound if self.metric in facts.metrics]
        ranked = sorted(having, key=lambda facts: (sign * facts.metrics[self.metric], -facts.step))
        return {
            facts.step: f"among the best {self.count}: {self.metric} {facts.metrics[self.metric]:.6g}"
            for facts in ranked[: self.count]
        }


@dataclass(frozen=True)
class KeepPolicy:
    """Everything that the config asks to keep. A step that any rule keeps stays."""

    rules: tuple[Rule, ...] = ()

    @classmethod
    def from_config(cls, config: CheckpointConfig) -> KeepPolicy:
        """The rules that ``config`` sets."""
        rules: list[Rule] = [LastN(config.keep_last_n)]
        if config.keep_every_n_steps is not None:
            rules.append(EveryNSteps(config.keep_every_n_steps))
        if config.keep_steps:
            rules.append(Milestones(tuple(config.keep_steps)))
        if config.keep_best_n is not None and config.best_metric is not None:
            rules.append(BestN(config.keep_best_n, config.best_metric, config.best_mode))
        return cls(tuple(rules))


def decide(steps: Iterable[StepInfo], policy: KeepPolicy) -> list[Verdict]:
    """What becomes of each step, newest first. Pure.

    The newest sound step is kept whatever the policy; so are steps that are pinned, being read, not sound, or
    another run's. The rules see none but the run's own sound steps.
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
