"""``[train]``: batches, steps and precision."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kempnerforge.config.section import AtLeastOne, NotNegative, Section


class TrainConfig(Section):
    """Batches, steps and precision."""

    global_batch_size: AtLeastOne | None = None
    """Sequences per optimizer step over all ranks. None means batch_size x data-parallel ranks of the
    first start, kept ever after."""

    batch_size: AtLeastOne = 8
    """Sequences that one rank computes at once. What is left to global_batch_size is accumulated."""

    seq_len: AtLeastOne = 256
    """Tokens per sequence."""

    max_steps: AtLeastOne = 1000
    """Optimizer steps until the run is finished. Raising it goes on with a finished run."""

    grad_clip_norm: NotNegative = 1.0
    """Largest norm of the gradients of all parameters together; 0 switches clipping off."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Determines the initial weights and the order of the data."""

    compile_model: bool = False
    """Compile the layers with torch.compile."""

    mixed_precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of forward and backward. Weights and optimizer state are fp32 in both."""

    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Which activations are computed again in the backward pass to save memory."""

    deterministic: bool = False
    """Use deterministic algorithms only, so that a resumed run on CUDA is bitwise the same."""

    max_skipped_steps: AtLeastOne = 10
    """Steps in a row with non-finite loss or gradients, each skipped, after which the run stops."""
