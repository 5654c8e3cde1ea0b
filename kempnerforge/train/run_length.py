"""Describe how long a run will be. Does not import torch."""

from __future__ import annotations

from kempnerforge.config.schema import JobConfig
from kempnerforge.telemetry.console_text import si


def run_length(job: JobConfig, sequences_per_step: int, *, num_samples: int | None = None) -> str:
    """Return ``200 steps, 409.6k tokens, 1.2 epochs``, and whether the number of steps is the default.

    ``num_samples`` is the number of sequences of the training data; None if it is not known.
    """
    train = job.train
    sequences = train.max_steps * sequences_per_step
    is_default = "max_steps" not in train.model_fields_set
    steps = f"{train.max_steps:,} step{'s' if train.max_steps > 1 else ''}"
    parts = [
        f"{steps} (the default: train.max_steps is not set)" if is_default else steps,
        f"{si(sequences * train.seq_len)} tokens",
    ]
    if num_samples:
        epochs = sequences / num_samples
        parts.append(f"{epochs:,.0f} epochs" if epochs >= 100 else f"{epochs:.3g} epochs")
    return ", ".join(parts)
