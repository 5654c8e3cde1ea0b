"""What a pipeline schedule keeps in flight, and how long its ranks wait.

The schedules are those of ``torch.distributed.pipelining``. The bubbles are those of Narayanan et al. 2021
("Efficient large-scale language model training on GPU clusters using Megatron-LM", arXiv:2104.04473, section
2.2), as a share of the whole time: with p ranks, m microbatches and v stages a rank, (p - 1) / (v m + p - 1).
"""

from __future__ import annotations

from kempnerforge.config.distributed import DistributedConfig
from kempnerforge.config.stages import STAGES_PER_RANK
from kempnerforge.config.train import TrainConfig


def microbatch_size(distributed: DistributedConfig, train: TrainConfig) -> int:
    """Sequences that go through the model at once."""
    return train.batch_size if distributed.pp == 1 else distributed.pp_microbatch_size or 1


def in_flight(distributed: DistributedConfig, microbatches: int, pp_rank: int) -> int:
    """Most (stage, microbatch) pairs whose activations a pipeline rank keeps at once.

    1F1B starts as many as there are ranks from here to the end, GPipe all of them. Interleaved 1F1B runs one
    round of microbatches through all but one of its stages, and two for every rank behind it, before the
    first backward pass.
    """
    pp, schedule = distributed.pp, distributed.pp_schedule
    if pp == 1:
        return 1
    stages = STAGES_PER_RANK[schedule]
    if schedule == "gpipe":
        return microbatches
    if schedule == "1f1b":
        return min(microbatches, pp - pp_rank)
    a_round = microbatches // max(1, microbatches // pp)
    return min(microbatches * stages, (stages - 1) * a_round + 2 * (pp - 1 - pp_rank) + 1)


def bubble_fraction(distributed: DistributedConfig, microbatches: int) -> float:
    """Share of its time that a pipeline rank waits, if all stages take equally long."""
    waits = distributed.pp - 1
    return waits / (STAGES_PER_RANK[distributed.pp_schedule] * microbatches + waits)
