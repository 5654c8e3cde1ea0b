"""How a number of processes divides into parallel dimensions, and the global batch over them."""

from __future__ import annotations

from dataclasses import dataclass

from kempnerforge.config.distributed import DistributedConfig
from kempnerforge.config.train import TrainConfig
from kempnerforge.errors import Fault


@dataclass(frozen=True)
class Geometry:
    """The layout of a run on a known number of processes."""

    dp_replicate: int
    dp_shard: int
    dp: int
    """Data-parallel ranks: dp_replicate x dp_shard. Each computes other samples."""
    tp: int
    pp: int
    global_batch_size: int
    """Sequences per optimizer step over all ranks."""
    accumulation_steps: int
    """Micro-batches of ``train.batch_size`` that each data-parallel rank computes per optimizer step."""

    def dp_rank(self, rank: int) -> int:
        """Which part of the data ``rank`` of all processes computes, of ``dp``.

        Ranks count as in ``kempnerforge.distributed.mesh``: tp innermost, pp outermost.
        """
        return rank // self.tp % self.dp


def derive_geometry(
    distributed: DistributedConfig, train: TrainConfig, world_size: int
) -> tuple[Geometry | None, list[Fault]]:
    """The geometry of ``world_size`` processes, or the faults for which there is none."""
    dp_shard, faults = _resolve_dp_shard(distributed, world_size)
    if dp_shard is None:
        return None, faults
    dp = distributed.dp_replicate * dp_shard
    faults = batch_faults(train, dp, "data-parallel ranks")
    if faults:
        return None, faults
    global_batch_size = train.global_batch_size or train.batch_size * dp
    geometry = Geometry(
        dp_replicate=distributed.dp_replicate,
        dp_shard=dp_shard,
        dp=dp,
        tp=distributed.tp,
        pp=distributed.pp,
        global_batch_size=global_batch_size,
        accumulation_steps=global_batch_size // (train.batch_size * dp),
    )
    return geometry, []


def batch_faults(train: TrainConfig, dp: int, dp_in_words: str) -> list[Fault]:
    """The fault of a global batch that ``dp`` ranks cannot share out, naming sizes that they can."""
    total, per_rank = train.global_batch_size, train.batch_size
    if total is None or total % (per_rank * dp) == 0:
        return []
    unit = per_rank * dp
    totals = [size for size in (total // unit * unit, (total // unit + 1) * unit) if size > 0]
    fits = f"global_batch_size {' or '.join(map(str, totals))} would fit"
    if sizes := _batch_sizes_near(per_rank, total, dp):
        fits += f", and so would batch_size {' or '.join(map(str, sizes))}"
    problem = f"{total} does not divide by batch_size {per_rank} x {dp} {dp_in_words} = {unit}"
    return [Fault("train.global_batch_size", problem, fits)]


def _resolve_dp_shard(distributed: DistributedConfig, world_size: int) -> tuple[int | None, list[Fault]]:
    replicate, shard = distributed.dp_replicate, distributed.dp_shard
    tp, pp = distributed.tp, distributed.pp
    others = replicate * tp * pp
    if shard == -1:
        if world_size % others == 0:
            return world_size // others, []
        product = f"dp_replicate {replicate} x tp {tp} x pp {pp} = {others}"
        problem = f"{product} does not divide the number of processes, {world_size}"
        fits = f"start a multiple of {others} processes"
    else:
        if others * shard == world_size:
            return shard, []
        product = f"dp_replicate {replicate} x dp_shard {shard} x tp {tp} x pp {pp} = {others * shard}"
        problem = f"{product}, but processes started: {world_size}"
        fits = f"start {others * shard} processes"
        if world_size % others == 0:
            fits += f", or set dp_shard = {world_size // others} or -1 (the rest)"
    # Name the key that can repair it; where tp or pp play a part, that may be any of them.
    if world_size % others == 0:
        return None, [Fault("distributed.dp_shard", problem, fits)]
    return None, [Fault("distributed.dp_replicate" if tp * pp == 1 else "distributed", problem, fits)]


def _batch_sizes_near(wanted: int, total: int, dp: int) -> list[int]:
    """Up to three values of ``batch_size`` with which ``total`` divides over ``dp``, nearest first."""
    if total % dp:
        return []
    per_rank = total // dp
    # Beyond this no micro-batch is of use, and a huge per_rank would take long to try.
    fitting = [size for size in range(1, min(per_rank, 4096) + 1) if per_rank % size == 0]
    return sorted(sorted(fitting, key=lambda size: abs(size - wanted))[:3])
