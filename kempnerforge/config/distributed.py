"""``[distributed]``: how the processes divide the work."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kempnerforge.config.section import AtLeastOne, Section

MinusOne = Annotated[int, Field(ge=-1, le=-1)]
"""Not ``Literal[-1]``, which would accept the float -1.0."""


class DistributedConfig(Section):
    """How dp_replicate x dp_shard x tp x pp processes divide the work."""

    dp_shard: MinusOne | AtLeastOne = -1
    """Ranks over which FSDP shards weights, gradients and optimizer state. -1 means all ranks that the
    other dimensions leave."""

    dp_replicate: AtLeastOne = 1
    """Number of replicas of the sharded model (HSDP)."""

    tp: AtLeastOne = 1
    """Ranks over which each layer is split (tensor parallelism)."""

    pp: AtLeastOne = 1
    """Ranks over which the sequence of layers is split (pipeline parallelism)."""

    pp_schedule: Literal["1f1b", "gpipe", "interleaved_1f1b"] = "1f1b"
    """Pipeline schedule. 1f1b needs at least pp microbatches per step. interleaved_1f1b runs two stages
    per rank, and its number of microbatches must be divisible by (microbatches // pp)."""

    pp_microbatch_size: AtLeastOne | None = None
    """Sequences per pipeline microbatch. Must divide train.batch_size. None means 1. With a pipeline,
    all sequences of a rank's optimizer step (global_batch_size / data-parallel ranks) pass through the
    schedule together, and batch_size only groups them."""

    pp_layers: list[AtLeastOne] | None = None
    """Number of decoder layers in each pipeline stage, in order. None means as even as possible, counting
    the embedding and the output layer."""

    timeout_s: Annotated[float, Field(gt=0, le=7 * 24 * 3600)] = 1800.0
    """Timeout of collectives in seconds. During work of rank 0 alone, such as tokenizing, the other ranks
    wait while it makes progress and abort after this time without progress."""
