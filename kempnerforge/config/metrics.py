"""``[metrics]``: what is reported, and where."""

from __future__ import annotations

from kempnerforge.config.section import AtLeastOne, NonEmpty, Section


class MetricsConfig(Section):
    """What is reported, and where."""

    log_interval: AtLeastOne = 10
    """Steps between lines on the console. metrics.jsonl gets every step."""

    enable_wandb: bool = False
    """Report to Weights & Biases; offline where there is no key."""

    wandb_project: NonEmpty = "kempnerforge"
    """Project in wandb."""

    wandb_run_name: NonEmpty | None = None
    """Name of the run in wandb; none means run.name."""
