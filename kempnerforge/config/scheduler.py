"""``[scheduler]``: the learning rate schedule."""

from __future__ import annotations

import math
from typing import Literal

from kempnerforge.config.section import AtLeastOne, AtLeastZero, FractionUpToOne, Section


class SchedulerConfig(Section):
    """The learning rate schedule."""

    name: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape after the warmup. wsd: warmup, stable, then linear decay."""

    warmup_steps: AtLeastZero = 0
    """Steps over which the learning rate rises linearly from 0 to its peak."""

    decay_steps: AtLeastOne | None = None
    """Length of the decay in steps. None means all steps after the warmup, or for wsd the last tenth of
    train.max_steps."""

    min_lr_ratio: FractionUpToOne = 0.1
    """Learning rate at the end of the decay, as a fraction of the peak."""

    def resolved_decay_steps(self, max_steps: int) -> int:
        """Return the length of the decay in a run of ``max_steps``; 0 for the constant schedule."""
        if self.name == "constant":
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
    """
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
