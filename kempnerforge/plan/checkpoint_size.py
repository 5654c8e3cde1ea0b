"""The size of a checkpoint, and the host memory in which ranks stage their part of it.

Sizes of tensors are exact: three fp32 copies and a counter per parameter, and the random number
generators of every rank. Headers, index and manifest follow
``docs/reference/checkpoint-format.md``. Headers are padded to pages, so the size of the files may
be off by 4 kB per rank.
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
"""The weight and AdamW's moments, each with the parameter's shape."""
RNG_BYTES = 10_112
"""State of a rank's random number generators with CUDA; 16 bytes fewer without."""
ALIGNMENT = 4096
DIGEST_UNIT_BYTES = 16 * 2**20
OTHER_FILES = 4
"""Index, train_state.json, config.toml, manifest.json."""


@dataclass(frozen=True)
class CheckpointSize:
    """The size of a committed step."""

    payload_bytes: int
    """Bytes of tensors, without headers."""
    size_bytes: int
    """Estimated bytes of all files."""
    num_files: int


def checkpoint_size(job: JobConfig, geometry: ParallelDims) -> CheckpointSize:
    """Return the size of a step saved by the ranks of ``geometry``."""
    stages = make_stages(job.model, job.distributed)
    parameters = [parameter for stage in stages for parameter in stage_parameters(job.model, stage)]
    ranks = geometry.world_size
    payload = sum(len(COPIES) * FP32 * parameter.numel + FP32 for parameter in parameters) + ranks * RNG_BYTES
    named = [chunks for parameter in parameters for chunks in _stored(parameter, geometry)]
    digits = 2 * len(str(payload // ranks))
    header = sum(count * (_header_bytes(name, shape) + digits) for name, shape, count in named) / ranks
    shard_headers = ranks * ALIGNMENT * math.ceil((header + 100) / ALIGNMENT)
    index = 32 + sum(
        23 + len(name) + 8 * len(shape) + count * (20 + 16 * len(shape)) for name, shape, count in named
    )
    index += ranks * (23 + 16 + 8 + 20 + 16 + 36)
    manifest = 900 + ranks * 130 + payload // DIGEST_UNIT_BYTES * 36
    other = 2_700 + sum(len(parameter.name) + 4 for parameter in parameters)
    return CheckpointSize(payload, payload + shard_headers + index + manifest + other, ranks + OTHER_FILES)


def staged_bytes(job: JobConfig, geometry: ParallelDims, pp_rank: int) -> int:
    """Return the host memory of the rank that stages the most at ``pp_rank``, without headers.

    Ranks that hold the same bytes divide the writing among them, so each stages only some of its
    tensors. Tensors are not split for this, so the result is at least the size of the rank's
    largest tensor.
    """
    stages = stages_of(make_stages(job.model, job.distributed), pp_rank, geometry.pp)
    parameters = [parameter for stage in stages for parameter in stage_parameters(job.model, stage)]
    share, largest = 0.0, 0
    for parameter in parameters:
        size = FP32 * math.prod(local_shape(parameter, geometry))
        holders = geometry.dp_replicate * (geometry.tp if parameter.tp_dim is None else 1)
        share += len(COPIES) * size / holders
        largest = max(largest, size)
    return max(math.ceil(share), largest) + RNG_BYTES


def staged_on_node(by_pp_rank: Sequence[int], geometry: ParallelDims, ranks_per_node: int) -> int:
    """Return the most bytes that the ranks of one node stage. Nodes have consecutive ranks."""
    ranks_of_a_stage = geometry.world_size // geometry.pp
    totals = [0] * math.ceil(geometry.world_size / ranks_per_node)
    for rank in range(geometry.world_size):
        totals[rank // ranks_per_node] += by_pp_rank[rank // ranks_of_a_stage]
    return max(totals)


def _stored(parameter: Parameter, geometry: ParallelDims) -> list[tuple[str, tuple[int, ...], int]]:
    """Return (name, shape of a chunk, number of chunks) of all tensors of a parameter in a checkpoint."""
    chunks = geometry.tp if parameter.tp_dim is not None else 1
    rows = tp_shape(parameter, geometry.tp)[0]
    shape = local_shape(parameter, geometry)
    chunks *= math.ceil(rows / shape[0])
    stored = [(f"optimizer.state.{parameter.name}.{copy}", shape, chunks) for copy in COPIES[1:]]
    stored.append((f"model.{parameter.name}", shape, chunks))
    stored.append((f"optimizer.state.{parameter.name}.step", (), 1))
    return stored


def _header_bytes(name: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor's two entries in the header of a shard, without its data offsets."""
    entry = len(f'"{name}":{{"dtype":"F32","shape":[],"data_offsets":[,]}},') + len(",".join(map(str, shape)))
    sharding = len(f'\\"{name}\\": {{\\"saved_offsets\\": []}}, ') + 3 * len(shape)
    return entry + sharding
