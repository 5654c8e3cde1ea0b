"""``[metrics]``: which metrics are reported, and where."""

from __future__ import annotations

from kempnerforge.config.section import Arguments, AtLeastOne, NonEmpty, Section


class SinkConfig(Section):
    """A sink: an additional destination of metrics."""

    name: NonEmpty
    """"tensorboard", or a class or a function that returns a sink: package.module:attribute, or a
    registered name."""

    args: Arguments = {}  # noqa: RUF012 - pydantic copies it
    """Keyword arguments of the sink."""


class MetricsConfig(Section):
    """Which metrics are reported, and where."""

    log_interval: AtLeastOne = 10
    """Steps between console lines. metrics.jsonl records every step."""

    enable_wandb: bool = False
    """Report to Weights & Biases. Without an API key, wandb runs offline."""

    wandb_project: NonEmpty = "kempnerforge"
    """Name of the wandb project."""

    wandb_run_name: NonEmpty | None = None
    """Name of the wandb run. None means run.name."""

    sinks: list[SinkConfig] = []  # noqa: RUF012 - pydantic copies it
    """Additional destinations of the rows of metrics.jsonl, such as TensorBoard."""
