"""``[optimizer]``: how gradients become updates."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kempnerforge.config.section import FractionBelowOne, NotNegative, Positive, Section


class OptimizerConfig(Section):
    """How gradients become updates."""

    name: Literal["adamw"] = "adamw"
    """Which optimizer."""

    lr: Positive = 3e-4
    """Peak learning rate."""

    weight_decay: NotNegative = 0.1
    """Decoupled weight decay."""

    # Not strict: TOML has lists where Python has tuples. The numbers inside stay strict.
    betas: Annotated[tuple[FractionBelowOne, FractionBelowOne], Field(strict=False)] = (0.9, 0.95)
    """Decay of the running means of the gradient and of its square."""

    eps: Positive = 1e-8
    """Added to the denominator of the update."""

    fused: bool = True
    """Use fused kernels where torch has them."""
