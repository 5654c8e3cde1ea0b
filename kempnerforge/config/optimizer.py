"""``[optimizer]``: the optimizer, its hyperparameters, and groups of parameters with their own."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from kempnerforge.config.section import Arguments, FractionBelowOne, NonEmpty, NotNegative, Positive, Section

ADAMW = "adamw"
ADAMW_DEFAULTS = {"weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "fused": True}
"""Hyperparameters of ``adamw`` that are not set. All others have the defaults of their class."""
HYPERPARAMETERS = ("weight_decay", "betas", "eps", "fused")
"""Keys that are passed to the optimizer if they are set. ``lr`` is always passed."""

# Not strict: TOML has lists where Python has tuples. The numbers inside remain strict.
Betas = Annotated[tuple[FractionBelowOne, FractionBelowOne], Field(strict=False)]


class OptimizerGroupConfig(Section):
    """Parameters whose names match a regular expression, and what differs for them.

    The first table that matches a parameter is used.
    """

    match: NonEmpty
    """Regular expression that is searched in the names of parameters, such as "embeddings"."""

    lr_scale: Positive | None = None
    """Factor on the learning rate, at every step of the schedule."""

    lr: Positive | None = None
    """Peak learning rate of the group. It follows the schedule too."""

    weight_decay: NotNegative | None = None
    """Weight decay of the group, also of its norms and biases."""

    betas: Betas | None = None
    """Decay rates of the running means."""

    eps: Positive | None = None
    """Added to the denominator of the update."""

    hidden: bool | None = None
    """For optimizers that update hidden matrices differently, such as muon: whether the group's
    parameters are hidden matrices. None means decide by the model's modules."""

    args: Arguments = Field(default_factory=dict)
    """Other keys of the optimizer's parameter group, such as momentum."""


class OptimizerConfig(Section):
    """The optimizer and its hyperparameters."""

    name: NonEmpty = ADAMW
    """"adamw", "muon", "lion", "schedule_free_adamw", "adafactor", "sgd", or an optimizer of your own:
    "torch.optim:RAdam", "package.module:attribute", or a name that an installed package registers.
    See docs/guide/optimizers.md."""

    lr: Positive = 3e-4
    """Peak learning rate."""

    weight_decay: NotNegative | None = None
    """Weight decay of matrices. None means 0.1 for adamw, else the default of the optimizer."""

    betas: Betas | None = None
    """Decay rates of the running means, of the gradient and its square in adamw. None means [0.9, 0.95]
    for adamw, else the default of the optimizer."""

    eps: Positive | None = None
    """Added to the denominator of the update. None means 1e-8 for adamw, else the default of the
    optimizer."""

    fused: bool | None = None
    """Use fused kernels where torch provides them. None means true for adamw, else the default of the
    optimizer."""

    args: Arguments = Field(default_factory=dict)
    """Other keyword arguments of the optimizer, such as momentum."""

    groups: list[OptimizerGroupConfig] = Field(default_factory=list)
    """Groups of parameters with their own hyperparameters."""

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults_of_adamw(cls, table: Any) -> Any:
        """Set what ``adamw`` does by default, so that a stored config says what was used."""
        if not isinstance(table, dict) or table.get("name", ADAMW) != ADAMW:
            return table
        unset = {key: value for key, value in ADAMW_DEFAULTS.items() if table.get(key) is None}
        return {**table, **unset}

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the optimizer: ``lr``, the hyperparameters that are set, and ``args``."""
        values = {key: getattr(self, key) for key in HYPERPARAMETERS}
        return {"lr": self.lr, **{k: v for k, v in values.items() if v is not None}, **self.args}
