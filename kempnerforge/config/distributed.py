"""``[distributed]``: how the processes share the work."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kempnerforge.config.section import AtLeastOne, Section

MinusOne = Annotated[int, Field(ge=-1, le=-1)]
"""Not ``Literal[-1]``: that would take the float -1.0 too."""


class DistributedConfig(Section):
    """How the processes share the work: dp_replicate x dp_shard x tp x pp of them."""

    dp_shard: MinusOne | AtLeastOne = -1
    """Ranks over which FSDP shards weights, gradients and optimizer state; -1 means all the rest."""

    dp_replicate: AtLeastOne = 1
    """Copies of the sharded model (HSDP)."""

    tp: AtLeastOne = 1
    """Ranks that share each layer (tensor parallelism)."""

    pp: AtLeastOne = 1
    """Ranks that share the layers out (pipeline parallelism)."""

    pp_schedule: Literal["1f1b", "gpipe", "interleaved_1f1b"] = "1f1b"
    """Order of the microbatches in the pipeline. 1f1b needs at least pp microbatches a step;
    interleaved_1f1b puts two stages on a rank and takes pp, or a few more that come out even."""

    pp_microbatch_size: AtLeastOne | None = None
    """Sequences per microbatch in the pipeline; divides train.batch_size. None means 1. All sequences of
    a rank's optimizer step (global_batch_size / data-parallel ranks) go through the pipeline at once, and
    batch_size only deals them out."""

    pp_layers: list[AtLeastOne] | None = None
    """Decoder layers of each pipeline stage, in order; none means as even as can be, embedding and output
    layer counted."""

    timeout_s: Annotated[float, Field(gt=0, le=7 * 24 * 3600)] = 1800.0
    """How long a rank waits for the others in a collective, in seconds. For work of rank 0 alone, such as
    tokenising, the others wait as long as it makes progress, and end after this time without."""
