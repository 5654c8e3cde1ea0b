"""Microbatches in flight and idle time of pipeline schedules.

The schedules are those of ``torch.distributed.pipelining``. The bubble is that of Narayanan et al.
2021 ("Efficient large-scale language model training on GPU clusters using Megatron-LM",
arXiv:2104.04473, section 2.2), as a fraction of the total time: with p ranks, m microbatches and v
stages per rank, it is (p - 1) / (v m + p - 1).
"""

from __future__ import annotations

from kempnerforge.config.distributed import DistributedConfig
from kempnerforge.config.pipeline_stages import STAGES_PER_RANK
from kempnerforge.config.train import TrainConfig


def microbatch_size(distributed: DistributedConfig, train: TrainConfig) -> int:
    """Return the number of sequences in one forward pass."""
    return train.batch_size if distributed.pp == 1 else distributed.pp_microbatch_size or 1


def in_flight(distributed: DistributedConfig, microbatches: int, pp_rank: int) -> int:
    """Return the maximum number of (stage, microbatch) pairs whose activations a rank keeps at once.

    With 1F1B, this is the number of ranks from this one to the last. With GPipe, it is all
    microbatches. Interleaved 1F1B keeps one round of microbatches in all but one of the rank's
    stages, two more for every later rank, and one more.
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
    """Return the actions of a pipeline rank in order: (whether it is a forward pass, index of its own stage).

    The microbatches of a stage run forward in order, and backward in the same order.
    """
    pp, stages = distributed.pp, STAGES_PER_RANK[distributed.pp_schedule]
    total = microbatches * stages
    if distributed.pp_schedule == "gpipe":
        return [(True, 0)] * total + [(False, 0)] * total
    # Forward passes before the first pair of 1F1B; if interleaved, one fewer than are in flight.
    ahead = in_flight(distributed, microbatches, pp_rank)
    if stages > 1:
        a_round = microbatches // max(1, microbatches // pp)
        ahead = min(total, (stages - 1) * a_round + 2 * (pp - 1 - pp_rank))
    else:
        a_round = microbatches
    forward = [(True, number // a_round % stages) for number in range(total)]
    backward = [(False, stages - 1 - number // a_round % stages) for number in range(total)]
    order, rest = forward[:ahead], forward[ahead:]
    for forward_pass, backward_pass in zip(rest, backward, strict=False):
        order += [forward_pass, backward_pass] if stages > 1 else [backward_pass, forward_pass]
    return order + backward[len(rest) :]


def bubble_fraction(distributed: DistributedConfig, microbatches: int) -> float:
    """Return the fraction of time that a pipeline rank is idle, if all stages take equally long."""
    waits = distributed.pp - 1
    return waits / (STAGES_PER_RANK[distributed.pp_schedule] * microbatches + waits)
