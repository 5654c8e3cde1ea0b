"""``[train]``: batches, steps and precision."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kempnerforge.config.section import (
    Arguments,
    AtLeastOne,
    AtLeastZero,
    NonEmpty,
    NotNegative,
    Positive,
    Section,
)

CHUNK_TOKENS = 1024
"""Tokens of a chunk of ``chunked_cross_entropy``, unless its argument says otherwise."""


class TrainConfig(Section):
    """Batches, steps and precision."""

    global_batch_size: AtLeastOne | None = None
    """Sequences per optimizer step over all ranks. None means batch_size x data-parallel ranks at the
    first start; later starts keep that number."""

    batch_size: AtLeastOne = 8
    """Sequences per rank in one forward and backward pass. Gradients are accumulated until
    global_batch_size is reached."""

    seq_len: AtLeastOne = 256
    """Tokens per sequence."""

    max_steps: AtLeastOne = 1000
    """Total number of optimizer steps. Raise it to continue a finished run."""

    loss: NonEmpty = "cross_entropy"
    """"cross_entropy", "chunked_cross_entropy" (the same loss in less memory, for large vocabularies), or
    a function of your own: "package.module:attribute", or a name that an installed package registers.
    See docs/guide/losses.md."""

    loss_args: Arguments = Field(default_factory=dict)
    """Keyword arguments of the loss."""

    z_loss: NotNegative = 0.0
    """Coefficient of the z-loss, the square of log(Z) of the softmax, which keeps logits from drifting
    (PaLM: 1e-4). 0 disables it."""

    grad_clip_norm: NotNegative = 1.0
    """Maximum global norm of the gradients. 0 disables clipping."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the initial weights and of the data order."""

    compile_model: bool = False
    """Compile the layers with torch.compile."""

    mixed_precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of forward and backward. Weights and optimizer state are fp32 in both."""

    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Which activations to recompute in the backward pass to save memory."""

    deterministic: bool = False
    """Use deterministic algorithms only, so that a resumed run on CUDA is bitwise equal."""

    max_skipped_steps: AtLeastOne = 10
    """Skip steps with a non-finite loss or gradient, or in which no target counts, and stop the run after
    this many in a row."""

    max_minutes: Positive | None = None
    """Time limit of an attempt in minutes. It then commits its last step and exits with status 75. None
    means no limit. The end of a SLURM job is detected without this key."""

    deadline_margin_s: NotNegative = 60.0
    """Seconds to spare between the commit of the last save and the end of the job or of max_minutes. The
    save starts this much earlier, plus the 99th percentile of save times, plus one step."""

    shutdown_timeout_s: Positive = 25.0
    """Seconds after SIGTERM, SIGINT or SIGHUP until a process that has not stopped dumps its stacks and
    exits. `kempnerforge train` waits 10 s longer. Keep it below SLURM's KillWait, and under torchrun
    below its --shutdown-timeout (30 s each): both kill without a report. Raise all if a step and a save
    take longer. SIGUSR1 does not start this timeout."""

    max_restarts: AtLeastZero = 3
    """Number of times in a row that `kempnerforge train` restarts all processes after a fault without a
    new committed step. A commit resets the count. 0 never restarts. torchrun does not read this key."""

    hang_multiple: NotNegative = 10.0
    """Report a step or a save that takes this many times its median, with the slowest rank and all stacks,
    while it is still running. Reporting only: distributed.timeout_s aborts. 0 disables."""

    hang_floor_s: Positive = 60.0
    """Minimum duration in seconds before a step or a save is reported as hung."""

    @property
    def chunk_tokens(self) -> int | None:
        """Tokens whose logits exist at once with "chunked_cross_entropy". None with another loss."""
        if self.loss != "chunked_cross_entropy":
            return None
        tokens = self.loss_args.get("chunk_tokens", CHUNK_TOKENS)
        return tokens if isinstance(tokens, int) else None

    def loss_is_recomputed(self, pp_schedule: str) -> bool:
        """Return whether "chunked_cross_entropy" computes logits in the backward pass again.

        By default under "gpipe", whose forward passes all precede the first backward pass.
        """
        return bool(self.loss_args.get("recompute", pp_schedule == "gpipe"))
