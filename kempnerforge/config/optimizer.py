"""``[optimizer]``: the optimizer and its hyperparameters."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kempnerforge.config.section import FractionBelowOne, NotNegative, Positive, Section


class OptimizerConfig(Section):
    """The optimizer and its hyperparameters."""

    name: Literal["adamw"] = "adamw"
    """Name of the optimizer."""

    lr: Positive = 3e-4
    """Peak learning rate."""

    weight_decay: NotNegative = 0.1
    """Decoupled weight decay."""

    # Not strict: TOML has lists where Python has tuples. The numbers inside remain strict.
    betas: Annotated[tuple[FractionBelowOne, FractionBelowOne], Field(strict=False)] = (0.9, 0.95)
    """Decay rates of the running means of the gradient and of its square."""

    eps: Positive = 1e-8
    """Added to the denominator of the update."""

    fused: bool = True
    """Use fused kernels where torch provides them."""
