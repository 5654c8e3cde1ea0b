"""Divide processes into parallel dimensions, and the global batch over data-parallel ranks."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from kempnerforge.config.distributed import DistributedConfig
from kempnerforge.config.train import TrainConfig
from kempnerforge.errors import ConfigIssue


@dataclass(frozen=True)
class ParallelDims:
    """The parallel layout of a run on a known number of processes."""

    dp_replicate: int
    dp_shard: int
    dp: int
    """Data-parallel ranks: dp_replicate x dp_shard. Each one trains on different samples."""
    tp: int
    pp: int
    global_batch_size: int
    """Sequences per optimizer step over all ranks."""
    accumulation_steps: int
    """Micro-batches of ``train.batch_size`` that each data-parallel rank computes per optimizer step."""
    pp_microbatches: int = 1
    """Pipeline microbatches per data-parallel rank and optimizer step."""

    def dp_rank(self, rank: int) -> int:
        """Return the data-parallel index, below ``dp``, of the global ``rank``.

        Ranks are ordered as in ``kempnerforge.distributed.mesh``: tp innermost, pp outermost.
        """
        return rank // self.tp % self.dp

    def pp_rank(self, rank: int) -> int:
        """Return the pipeline index, below ``pp``, of the global ``rank``."""
        return rank // (self.tp * self.dp)

    @property
    def mesh(self) -> dict[str, int]:
        """Dimension -> size, outermost first, as in ``kempnerforge.distributed.mesh``."""
        return {"pp": self.pp, "dp_replicate": self.dp_replicate, "dp_shard": self.dp_shard, "tp": self.tp}

    @property
    def world_size(self) -> int:
        """Total number of ranks."""
        return self.pp * self.dp * self.tp

    def coordinate(self, rank: int) -> dict[str, int]:
        """Return the index of the global ``rank`` in each dimension of the mesh."""
        index = {}
        for dim, size in reversed(self.mesh.items()):
            rank, index[dim] = divmod(rank, size)
        return {dim: index[dim] for dim in self.mesh}

    def groups(self, dim: str) -> list[list[int]]:
        """Return the process groups of ``dim``: each holds the ranks that differ in ``dim`` alone."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            others = tuple(index for name, index in self.coordinate(rank).items() if name != dim)
            groups.setdefault(others, []).append(rank)
        return list(groups.values())


def derive_geometry(
    distributed: DistributedConfig, train: TrainConfig, world_size: int
) -> tuple[ParallelDims | None, list[ConfigIssue]]:
    """Return the layout of ``world_size`` processes, or the issues that prevent one."""
    dp_shard, faults = _resolve_dp_shard(distributed, world_size)
    if dp_shard is None:
        return None, faults
    dp = distributed.dp_replicate * dp_shard
    faults = batch_faults(train, dp, "data-parallel ranks")
    if faults:
        return None, faults
    faults = microbatch_faults(distributed, train, dp)
    if faults:
        return None, faults
    global_batch_size = train.global_batch_size or train.batch_size * dp
    geometry = ParallelDims(
        dp_replicate=distributed.dp_replicate,
        dp_shard=dp_shard,
        dp=dp,
        tp=distributed.tp,
        pp=distributed.pp,
        global_batch_size=global_batch_size,
        accumulation_steps=global_batch_size // (train.batch_size * dp),
        pp_microbatches=_pp_microbatches(distributed, global_batch_size // dp),
    )
    return geometry, []


def batch_faults(train: TrainConfig, dp: int, dp_in_words: str) -> list[ConfigIssue]:
    """Report a global batch that does not divide over ``dp`` ranks, and name sizes that do."""
    total, per_rank = train.global_batch_size, train.batch_size
    if total is None or total % (per_rank * dp) == 0:
        return []
    unit = per_rank * dp
    totals = [size for size in (total // unit * unit, (total // unit + 1) * unit) if size > 0]
    fits = f"global_batch_size {' or '.join(map(str, totals))} would fit"
    if sizes := _batch_sizes_near(per_rank, total, dp):
        fits += f", and so would batch_size {' or '.join(map(str, sizes))}"
    problem = f"{total} does not divide by batch_size {per_rank} x {dp} {dp_in_words} = {unit}"
    return [ConfigIssue("train.global_batch_size", problem, fits)]


def microbatch_faults(distributed: DistributedConfig, train: TrainConfig, dp: int) -> list[ConfigIssue]:
    """Report a number of microbatches that the pipeline schedule cannot run, and name batches that fit.

    ``dp`` is not used while ``train.global_batch_size`` is unset.
    """
    pp, schedule, micro = distributed.pp, distributed.pp_schedule, distributed.pp_microbatch_size or 1
    if pp == 1 or train.batch_size % micro:
        return []
    if train.global_batch_size is None:
        key, value, unit, per_unit = "train.batch_size", train.batch_size, micro, 1
    else:
        key, value, unit = "train.global_batch_size", train.global_batch_size, train.batch_size * dp
        per_unit = train.batch_size // micro
    units = value // unit
    if schedule_runs(schedule, units * per_unit, pp):
        return []
    least = f"at least {pp}" if schedule == "1f1b" else f"a multiple of {units * per_unit // pp}"
    problem = f"{value} makes {units * per_unit} microbatches per rank; {schedule} with pp {pp} needs {least}"
    below = [n for n in range(1, units) if schedule_runs(schedule, n * per_unit, pp)][-1:]
    above = next(n for n in itertools.count(units + 1) if schedule_runs(schedule, n * per_unit, pp))
    fits = " or ".join(str(n * unit) for n in (*below, above))
    return [ConfigIssue(key, problem, f"{key.removeprefix('train.')} {fits} would fit")]


def _pp_microbatches(distributed: DistributedConfig, sequences: int) -> int:
    return sequences // (distributed.pp_microbatch_size or 1) if distributed.pp > 1 else 1


def schedule_runs(schedule: str, microbatches: int, pp: int) -> bool:
    """Return whether torch's ``schedule`` accepts that many microbatches (as torch 2.11 to 2.13 check)."""
    if schedule == "1f1b":
        return microbatches >= pp
    if schedule == "interleaved_1f1b":
        return microbatches % max(1, microbatches // pp) == 0
    return True


def _resolve_dp_shard(
    distributed: DistributedConfig, world_size: int
) -> tuple[int | None, list[ConfigIssue]]:
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
    # Name the key that can fix it. With tp or pp above 1 it may be any of them.
    if world_size % others == 0:
        return None, [ConfigIssue("distributed.dp_shard", problem, fits)]
    return None, [ConfigIssue("distributed.dp_replicate" if tp * pp == 1 else "distributed", problem, fits)]


def _batch_sizes_near(wanted: int, total: int, dp: int) -> list[int]:
    """Return up to three values of ``batch_size`` with which ``total`` divides over ``dp``, nearest first."""
    if total % dp:
        return []
    per_rank = total // dp
    # Larger micro-batches are useless, and trying every divisor of a huge per_rank would be slow.
    fitting = [size for size in range(1, min(per_rank, 4096) + 1) if per_rank % size == 0]
    return sorted(sorted(fitting, key=lambda size: abs(size - wanted))[:3])
