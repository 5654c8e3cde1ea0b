"""``[train]``: batches, steps and precision."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kempnerforge.config.section import AtLeastOne, NotNegative, Positive, Section


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

    max_minutes: Positive | None = None
    """Minutes from the start of an attempt after which it stops with status 75, its last step committed.
    None means no limit of its own; the end of a SLURM job is known without it."""

    deadline_margin_s: NotNegative = 60.0
    """Seconds that are to be left when the last save before the end of the job, or of max_minutes, commits.
    The save starts earlier by this, by what 99% of saves took, and by a step."""

    shutdown_timeout_s: Positive = 25.0
    """Seconds from SIGTERM, SIGINT or SIGHUP until a process that has not stopped ends at once, with its
    stacks. Below what kills it without a word: torchrun --shutdown-timeout and SLURM's KillWait, 30 s both;
    raise it together with them where a step and a save take longer. SIGUSR1 starts no clock."""

    hang_multiple: NotNegative = 10.0
    """A step or a save that lasts this many times its median is reported while it lasts, with the rank that
    lags and all stacks. It ends nothing; distributed.timeout_s does. 0 reports none."""

    hang_floor_s: Positive = 60.0
    """No step or save is reported before it has lasted this many seconds."""
