"""The size of a checkpoint, and the host memory in which ranks stage what they write of it.

What is said about tensors is exact: three fp32 copies of every parameter, a counter each, and every rank's
random number generators. Headers, index and manifest follow ``docs/reference/checkpoint-format.md``; since
headers are padded to pages, what is said of the files may be off by 4 kB a rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kempnerforge.config.job import JobConfig
from kempnerforge.config.parallel_dims import ParallelDims
from kempnerforge.config.pipeline_stages import make_stages, stages_of
from kempnerforge.plan.tensors import Parameter, local_shape, stage_parameters, tp_shape

FP32 = 4
COPIES = ("model", "exp_avg", "exp_avg_sq")
"""The weight and AdamW's moments, each of the parameter's shape."""
RNG_BYTES = 10_112
"""Generators of a rank with CUDA; 16 fewer without."""
ALIGNMENT = 4096
DIGEST_UNIT_BYTES = 16 * 2**20
OTHER_FILES = 4
"""Index, train_state.json, config.toml, manifest.json."""


@dataclass(frozen=True)
class CheckpointSize:
    """One committed step."""

    payload_bytes: int
    """Of tensors, without headers."""
    size_bytes: int
    """Of all files, as estimated."""
    num_files: int


def checkpoint_size(job: JobConfig, geometry: ParallelDims) -> CheckpointSize:
    """The size of a step that the ranks of ``geometry`` save together."""
    stages = make_stages(job.model, job.distributed)
    parameters = [one for stage in stages for one in stage_parameters(job.model, stage)]
    ranks = geometry.world_size
    payload = sum(len(COPIES) * FP32 * one.numel + FP32 for one in parameters) + ranks * RNG_BYTES
    named = [chunks for one in parameters for chunks in _stored(one, geometry)]
    digits = 2 * len(str(payload // ranks))
    header = sum(count * (_header_bytes(name, shape) + digits) for name, shape, count in named) / ranks
    shard_headers = ranks * ALIGNMENT * math.ceil((header + 100) / ALIGNMENT)
    index = 32 + sum(
        23 + len(name) + 8 * len(shape) + count * (20 + 16 * len(shape)) for name, shape, count in named
    )
    index += ranks * (23 + 16 + 8 + 20 + 16 + 36)
    manifest = 900 + ranks * 130 + payload // DIGEST_UNIT_BYTES * 36
    other = 2_700 + sum(len(one.name) + 4 for one in parameters)
    return CheckpointSize(payload, payload + shard_headers + index + manifest + other, ranks + OTHER_FILES)


def staged_bytes(job: JobConfig, geometry: ParallelDims, pp_rank: int) -> int:
    """Host memory of the rank that stages the most at ``pp_rank``: what it writes, headers left out.

    Ranks that hold the same bytes share the writing, so each takes its part of what it holds; and since
    tensors are not split for it, never less than the largest one that it has.
    """
    stages = stages_of(make_stages(job.model, job.distributed), pp_rank, geometry.pp)
    parameters = [one for stage in stages for one in stage_parameters(job.model, stage)]
    share, largest = 0.0, 0
    for one in parameters:
        size = FP32 * math.prod(local_shape(one, geometry))
        holders = geometry.dp_replicate * (geometry.tp if one.tp_dim is None else 1)
        share += len(COPIES) * size / holders
        largest = max(largest, size)
    return max(math.ceil(share), largest) + RNG_BYTES


def staged_on_node(by_pp_rank: Sequence[int], geometry: ParallelDims, ranks_per_node: int) -> int:
    """Most that the ranks of one node stage together; nodes hold ranks that follow each other."""
    ranks_of_a_stage = geometry.world_size // geometry.pp
    totals = [0] * math.ceil(geometry.world_size / ranks_per_node)
    for rank in range(geometry.world_size):
        totals[rank // ranks_per_node] += by_pp_rank[rank // ranks_of_a_stage]
    return max(totals)


def _stored(parameter: Parameter, geometry: ParallelDims) -> list[tuple[str, tuple[int, ...], int]]:
    """(name, shape of a chunk, number of chunks) of everything that a checkpoint has of one parameter."""
    chunks = geometry.tp if parameter.tp_dim is not None else 1
    rows = tp_shape(parameter, geometry.tp)[0]
    shape = local_shape(parameter, geometry)
    chunks *= math.ceil(rows / shape[0])
    found = [(f"optimizer.state.{parameter.name}.{copy}", shape, chunks) for copy in COPIES[1:]]
    found.append((f"model.{parameter.name}", shape, chunks))
    found.append((f"optimizer.state.{parameter.name}.step", (), 1))
    return found


def _header_bytes(name: str, shape: tuple[int, ...]) -> int:
    """JSON of one tensor in a shard's header, twice as it stands there; its data offsets are left out."""
    entry = len(f'"{name}":{{"dtype":"F32","shape":[],"data_offsets":[,]}},') + len(",".join(map(str, shape)))
    sharding = len(f'\\"{name}\\": {{\\"saved_offsets\\": []}}, ') + 3 * len(shape)
    return entry + sharding
