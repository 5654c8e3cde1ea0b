"""Describe how long a run will be. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping

from kempnerforge.config.schema import JobConfig
from kempnerforge.telemetry.console_text import si

SHOWN_SOURCES = 4


def run_length(
    job: JobConfig,
    sequences_per_step: int,
    *,
    num_samples: int | None = None,
    epochs: Mapping[str, float] | None = None,
    used_up: str = "",
) -> str:
    """Return ``200 steps, 409.6k tokens, 1.2 epochs``, and whether the number of steps is the default.

    ``num_samples`` is the number of sequences of the training data; None if it is not known.
    ``epochs`` are those of each source of a mixture. ``used_up`` is the source that determines the
    number of steps.
    """
    train = job.train
    sequences = train.max_steps * sequences_per_step
    is_default = "max_steps" not in train.model_fields_set
    steps = f"{train.max_steps:,} step{'s' if train.max_steps > 1 else ''}"
    if used_up:
        steps += f' (then source "{used_up}" is used up)'
    elif is_default:
        steps += " (the default: train.max_steps is not set)"
    parts = [
        steps,
        f"{si(sequences * train.seq_len)} tokens",
    ]
    if epochs:
        parts.append(_epochs_of_sources(epochs))
    elif num_samples:
        parts.append(_epochs(sequences / num_samples))
    return ", ".join(parts)


def _epochs(epochs: float) -> str:
    return f"{epochs:,.0f} epochs" if epochs >= 100 else f"{epochs:.3g} epochs"


def _epochs_of_sources(epochs: Mapping[str, float]) -> str:
    """Return the epochs of the sources that are read most often."""
    most = sorted(epochs.items(), key=lambda item: -item[1])
    shown = [f"{_epochs(value)} of {name}" for name, value in most[:SHOWN_SOURCES]]
    more = len(most) - len(shown)
    return ", ".join(shown) + (f", fewer of {more} more sources" if more else "")
