"""Compare the learning rate under the config of a checkpoint and the config of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from kempnerforge.config.optimizer import OptimizerConfig
from kempnerforge.config.scheduler import SchedulerConfig, lr_at
from kempnerforge.config.section import Section
from kempnerforge.config.train import TrainConfig
from kempnerforge.errors import ConfigError

_S = TypeVar("_S", bound=Section)


@dataclass(frozen=True)
class LearningRateChange:
    """The learning rate of one update under two configs."""

    before: float
    now: float
    to_keep: str = ""
    """The setting that keeps the old schedule; empty if no single key does."""


def learning_rate_change(
    stored: Mapping[str, Any], now: Mapping[str, Any], step: int
) -> LearningRateChange | None:
    """Compare the learning rate of the update from ``step`` to ``step + 1`` under two whole configs.

    Return None if it is the same, or if this version cannot read one of the configs, or has not the
    schedule of the user's that the stored one names.
    """
    before, after = _Schedule.of(stored), _Schedule.of(now)
    if before is None or after is None:
        return None
    try:
        if before.lr_at(step) == after.lr_at(step):
            return None
    except ConfigError:
        return None
    kept = after.keeping(before)
    is_kept = kept is not None and kept.lr_at(step) == before.lr_at(step)
    to_keep = f"scheduler.decay_steps = {kept.scheduler.decay_steps}" if kept is not None and is_kept else ""
    return LearningRateChange(before.lr_at(step), after.lr_at(step), to_keep)


def when_continued(scheduler: SchedulerConfig, *, base_lr: float, max_steps: int, until: int) -> str:
    """Describe how the learning rate changes when a run that ended at ``max_steps`` continues to ``until``.

    Empty if it does not change, or if a schedule of the user's has no value there.
    """
    ended = _Schedule(scheduler, base_lr, max_steps)
    longer = _Schedule(scheduler, base_lr, until)
    try:
        was, is_now = ended.lr_at(max_steps), longer.lr_at(max_steps)
    except ConfigError:
        return ""
    if was == is_now:
        return ""
    kept = longer.keeping(ended)
    jump = f"the learning rate then changes from {was:.3g} to {is_now:.3g}"
    if kept is not None and kept.lr_at(max_steps) == was:
        return f"{jump}; add --scheduler.decay_steps={kept.scheduler.decay_steps} to keep it"
    return (
        f"{jump}, because the decay is at the end of the run; to continue at the full rate, roll back "
        "to before the decay"
    )


@dataclass(frozen=True)
class _Schedule:
    scheduler: SchedulerConfig
    base_lr: float
    max_steps: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> _Schedule | None:
        try:
            scheduler = _read(SchedulerConfig, config.get("scheduler", {}))
            base_lr = _read(OptimizerConfig, config.get("optimizer", {})).lr
            max_steps = _read(TrainConfig, config.get("train", {})).max_steps
        except ValidationError:
            return None
        return cls(scheduler, base_lr, max_steps)

    def lr_at(self, step: int) -> float:
        return lr_at(step, self.scheduler, base_lr=self.base_lr, max_steps=self.max_steps)

    def keeping(self, before: _Schedule) -> _Schedule | None:
        """Return this schedule with the decay of ``before``; None if ``max_steps`` does not determine it."""
        decay_steps = before.scheduler.resolved_decay_steps(before.max_steps)
        if self.scheduler.decay_steps is not None or decay_steps < 1:
            return None
        fixed = self.scheduler.model_copy(update={"decay_steps": decay_steps})
        return _Schedule(fixed, self.base_lr, self.max_steps)


def _read(section: type[_S], table: Mapping[str, Any]) -> _S:
    supported = {key: value for key, value in table.items() if key in section.model_fields}
    return section.model_validate(supported)
