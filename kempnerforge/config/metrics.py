"""``[metrics]``: which metrics are reported, and where."""

from __future__ import annotations

from kempnerforge.config.section import AtLeastOne, NonEmpty, Section


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
