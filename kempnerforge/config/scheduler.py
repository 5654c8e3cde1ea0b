"""``[scheduler]``: the learning rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

from pydantic import Field

from kempnerforge.config.section import Arguments, AtLeastOne, AtLeastZero, FractionUpToOne, NonEmpty, Section
from kempnerforge.errors import ConfigError, ConfigIssue
from kempnerforge.plugins import resolve

BUILT_IN = ("cosine", "linear", "wsd", "constant")


class SchedulerConfig(Section):
    """The learning rate schedule."""

    name: NonEmpty = "cosine"
    """Shape after the warmup: "cosine", "linear", "constant", or "wsd" (warmup, stable, then linear decay).
    Or a schedule of your own: "package.module:function", or a name that an installed package registers.
    It is called as fn(step, max_steps, **args) and returns a factor on the peak learning rate."""

    args: Arguments = Field(default_factory=dict)
    """Keyword arguments of a schedule of your own."""

    warmup_steps: AtLeastZero = 0
    """Steps over which the learning rate rises linearly from 0 to its peak."""

    decay_steps: AtLeastOne | None = None
    """Length of the decay in steps. None means all steps after the warmup, or for wsd the last tenth of
    train.max_steps."""

    min_lr_ratio: FractionUpToOne = 0.1
    """Learning rate at the end of the decay, as a fraction of the peak."""

    @property
    def is_built_in(self) -> bool:
        """Whether it is one of KempnerForge's own, which the keys of this section describe."""
        return self.name in BUILT_IN

    def resolved_decay_steps(self, max_steps: int) -> int:
        """Return the length of the decay in a run of ``max_steps``.

        0 for the constant schedule, and for one of the user's, which does not say.
        """
        if self.name == "constant" or not self.is_built_in:
            return 0
        if self.decay_steps is not None:
            return self.decay_steps
        if self.name == "wsd":
            return max(1, max_steps // 10)
        return max(0, max_steps - self.warmup_steps)


def lr_at(step: int, config: SchedulerConfig, *, base_lr: float, max_steps: int) -> float:
    """Return the learning rate of the update from ``step`` to ``step + 1``.

    A linear warmup reaches ``base_lr`` in its last step. The rate then decays to
    ``min_lr_ratio * base_lr``. For cosine (arXiv:1608.03983) and linear, it decays over the
    ``decay_steps`` after the warmup. For WSD (arXiv:2404.06395), it decays linearly over the last
    ``decay_steps`` of the run. After the decay it remains at the minimum.

    A schedule of the user's is called with ``step``, ``max_steps`` and ``args``. Raises ConfigError
    if it cannot be imported or called, or returns no factor.
    """
    if not config.is_built_in:
        return base_lr * _multiplier(config, step, max_steps)
    if step < config.warmup_steps:
        return base_lr * (step + 1) / config.warmup_steps
    if config.name == "constant":
        return base_lr
    decay_steps = config.resolved_decay_steps(max_steps)
    start = config.warmup_steps
    if config.name == "wsd":
        start = max(start, max_steps - decay_steps)
    progress = min(1.0, (step - start) / decay_steps) if decay_steps else 1.0
    if config.name == "cosine":
        remaining = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        remaining = 1 - max(0.0, progress)
    return base_lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * remaining)


def _multiplier(config: SchedulerConfig, step: int, max_steps: int) -> float:
    """Return what a schedule of the user's returns, after checking it."""
    function = _function(config.name)
    try:
        value = function(step, max_steps, **config.args)
    except Exception as error:
        problem = f'"{config.name}" raised {type(error).__name__} at step {step}: {error}'
        raise _fault(problem) from error
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise _fault(f'"{config.name}" returned {value!r} at step {step}')
    return value


def _fault(problem: str) -> ConfigError:
    hint = "fn(step, max_steps, **args) returns a finite number that is at least 0"
    return ConfigError([ConfigIssue("scheduler.name", problem, hint)])


@cache
def _function(name: str) -> Callable[..., Any]:
    return resolve("scheduler", name, key="scheduler.name", also=BUILT_IN).target
