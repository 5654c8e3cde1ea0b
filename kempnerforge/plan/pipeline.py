"""What a pipeline schedule keeps in flight, and how long its ranks wait.

The schedules are those of ``torch.distributed.pipelining``. The bubbles are those of Narayanan et al. 2021
("Efficient large-scale language model training on GPU clusters using Megatron-LM", arXiv:2104.04473, section
2.2), as a share of the whole time: with p ranks, m microbatches and v stages a rank, (p - 1) / (v m + p - 1).
"""

from __future__ import annotations

from kempnerforge.config.distributed import DistributedConfig
from kempnerforge.config.pipeline_stages import STAGES_PER_RANK
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


def schedule_order(distributed: DistributedConfig, microbatches: int, pp_rank: int) -> list[tuple[bool, int]]:
    """What a pipeline rank computes, in order: (is it a forward pass, which of its own stages).

    The microbatches of a stage go forward in their order, and backward in the same order.
    """
    pp, stages = distributed.pp, STAGES_PER_RANK[distributed.pp_schedule]
    total = microbatches * stages
    if distributed.pp_schedule == "gpipe":
        return [(True, 0)] * total + [(False, 0)] * total
    # Forward passes of 1F1B before the first backward pass; interleaved, one fewer than are in flight.
    ahead = in_flight(distributed, microbatches, pp_rank)
    if stages > 1:
        a_round = microbatches // max(1, microbatches // pp)
        ahead = min(total, (stages - 1) * a_round + 2 * (pp - 1 - pp_rank))
    else:
        a_round = microbatches
    forward = [(True, number // a_round % stages) for number in range(total)]
    backward = [(False, stages - 1 - number // a_round % stages) for number in range(total)]
    order, rest = forward[:ahead], forward[ahead:]
    for one, other in zip(rest, backward, strict=False):
        order += [one, other] if stages > 1 else [other, one]
    return order + backward[len(rest) :]


def bubble_fraction(distributed: DistributedConfig, microbatches: int) -> float:
    """Share of its time that a pipeline rank waits, if all stages take equally long."""
    waits = distributed.pp - 1
    return waits / (STAGES_PER_RANK[distributed.pp_schedule] * microbatches + waits)
