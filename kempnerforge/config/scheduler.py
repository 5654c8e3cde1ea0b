"""``[scheduler]``: the learning rate over the steps."""

from __future__ import annotations

from typing import Literal

from kempnerforge.config.section import AtLeastOne, AtLeastZero, FractionUpToOne, Section


class SchedulerConfig(Section):
    """The learning rate over the steps."""

    name: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape after the warmup: wsd is warmup, stable, then linear decay."""

    warmup_steps: AtLeastZero = 0
    """Steps over which the learning rate rises linearly from 0 to its peak."""

    decay_steps: AtLeastOne | None = None
    """Length of the decay in steps. None means all steps after the warmup; for wsd, whose decay comes
    last, a tenth of train.max_steps."""

    min_lr_ratio: FractionUpToOne = 0.1
    """Learning rate at the end of the decay, as a share of the peak."""

    def resolved_decay_steps(self, max_steps: int) -> int:
        """Length of the decay in a run of ``max_steps``; 0 for the constant schedule."""
        if self.name == "constant":
            return 0
        if self.decay_steps is not None:
            return self.decay_steps
        if self.name == "wsd":
            return max(1, max_steps // 10)
        return max(0, max_steps - self.warmup_steps)
