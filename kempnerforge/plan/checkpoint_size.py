"""The size of a checkpoint, and the host memory in which ranks stage their part of it.

Sizes of tensors are exact: the weights in fp32, the state of the optimizer, and the random number
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
from kempnerforge.plan.optimizer_state import OptimizerState, StateTensor, state_of
from kempnerforge.plan.tensors import Parameter, local_shape, stage_parameters, tp_shape

WEIGHT = StateTensor("")
"""The weight itself, as if it were state."""
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
    written_bytes: int
    """Estimated bytes that a save writes after the first one of an attempt: files of frozen parameters are
    linked."""
    num_files: int


def checkpoint_size(
    job: JobConfig, geometry: ParallelDims, probed: OptimizerState | None = None
) -> CheckpointSize:
    """Return the size of a step saved by the ranks of ``geometry``.

    ``probed``: see ``plan.optimizer_state.state_of``.
    """
    stages = make_stages(job.model, job.distributed)
    parameters = [parameter for stage in stages for parameter in stage_parameters(job.model, stage)]
    return size_of(parameters, job, geometry, probed)


def size_of(
    parameters: Sequence[Parameter], job: JobConfig, geometry: ParallelDims, probed: OptimizerState | None
) -> CheckpointSize:
    """Return the size of a step with ``parameters``, those of the whole model."""
    ranks = geometry.world_size
    tensors = [
        (parameter, prefix, tensor)
        for parameter in parameters
        for prefix, tensor in _tensors(job, parameter, probed)
    ]
    payload = sum(tensor.size_bytes(parameter.shape) for parameter, _, tensor in tensors) + ranks * RNG_BYTES
    named = [_stored(parameter, prefix, tensor, geometry) for parameter, prefix, tensor in tensors]
    digits = 2 * len(str(payload // ranks))
    frozen_headers, frozen_files = 0, 0
    headers = {False: 0, True: 0}
    for (parameter, _, _), (name, shape, count) in zip(tensors, named, strict=True):
        headers[parameter.frozen] += count * (_header_bytes(name, shape) + digits)
    shard_headers = ranks * ALIGNMENT * math.ceil((headers[False] / ranks + 100) / ALIGNMENT)
    if headers[True]:
        frozen_files = ranks
        frozen_headers = ranks * ALIGNMENT * math.ceil((headers[True] / ranks + 100) / ALIGNMENT)
    index = 32 + sum(
        23 + len(name) + 8 * len(shape) + count * (20 + 16 * len(shape)) for name, shape, count in named
    )
    index += ranks * (23 + 16 + 8 + 20 + 16 + 36)
    manifest = 900 + (ranks + frozen_files) * 130 + payload // DIGEST_UNIT_BYTES * 36
    other = 2_700 + sum(len(parameter.name) + 4 for parameter in parameters)
    size_bytes = payload + shard_headers + frozen_headers + index + manifest + other
    frozen_bytes = frozen_headers + sum(
        tensor.size_bytes(parameter.shape) for parameter, _, tensor in tensors if parameter.frozen
    )
    num_files = ranks + frozen_files + OTHER_FILES
    return CheckpointSize(payload, size_bytes, size_bytes - frozen_bytes, num_files)


def staged_bytes(
    job: JobConfig, geometry: ParallelDims, pp_rank: int, probed: OptimizerState | None = None
) -> int:
    """Return the host memory of the rank that stages the most at ``pp_rank``, without headers.

    Ranks that hold the same bytes divide the writing among them, so each stages only some of its
    tensors. Tensors are not split for this, so the result is at least the size of the rank's
    largest tensor.
    """
    stages = stages_of(make_stages(job.model, job.distributed), pp_rank, geometry.pp)
    parameters = [parameter for stage in stages for parameter in stage_parameters(job.model, stage)]
    return staged_bytes_of(parameters, job, geometry, probed)


def staged_bytes_of(
    parameters: Sequence[Parameter], job: JobConfig, geometry: ParallelDims, probed: OptimizerState | None
) -> int:
    """Return what ``staged_bytes`` does, for a rank with a share of ``parameters``."""
    share, largest = 0.0, 0
    for parameter in parameters:
        for _, tensor in _tensors(job, parameter, probed):
            if tensor.kind == "scalar":
                continue
            size = tensor.size_bytes(local_shape(parameter, geometry))
            share += size / _holders(parameter, tensor, geometry)
            largest = max(largest, size)
    return max(math.ceil(share), largest) + RNG_BYTES


def staged_on_node(by_pp_rank: Sequence[int], geometry: ParallelDims, ranks_per_node: int) -> int:
    """Return the most bytes that the ranks of one node stage. Nodes have consecutive ranks."""
    ranks_of_a_stage = geometry.world_size // geometry.pp
    totals = [0] * math.ceil(geometry.world_size / ranks_per_node)
    for rank in range(geometry.world_size):
        totals[rank // ranks_per_node] += by_pp_rank[rank // ranks_of_a_stage]
    return max(totals)


def _tensors(
    job: JobConfig, parameter: Parameter, probed: OptimizerState | None
) -> list[tuple[str, StateTensor]]:
    """Return the name without the key, and the tensor, of all that a checkpoint has of a parameter."""
    state = state_of(job, parameter, probed)
    base = f"{state.prefix}state.{parameter.name}."
    return [(f"model.{parameter.name}", WEIGHT), *((base, tensor) for tensor in state.tensors)]


def _holders(parameter: Parameter, tensor: StateTensor, geometry: ParallelDims) -> int:
    """Return the number of ranks that hold the same part of a tensor."""
    dims = len(parameter.shape)
    is_tp_sharded = parameter.tp_dim is not None and tensor.keeps(parameter.tp_dim, dims)
    copies = geometry.dp_replicate * (1 if is_tp_sharded else geometry.tp)
    return copies * (1 if tensor.keeps(0, dims) else geometry.dp_shard)


def _stored(
    parameter: Parameter, prefix: str, tensor: StateTensor, geometry: ParallelDims
) -> tuple[str, tuple[int, ...], int]:
    """Return name, shape of a chunk, and number of chunks of a tensor in a checkpoint."""
    dims, local = len(parameter.shape), local_shape(parameter, geometry)
    chunks = 1
    if parameter.tp_dim is not None and tensor.keeps(parameter.tp_dim, dims):
        chunks *= geometry.tp
    if tensor.keeps(0, dims):
        chunks *= math.ceil(tp_shape(parameter, geometry.tp)[0] / local[0])
    return prefix + tensor.key, tensor.shape(local), chunks


def _header_bytes(name: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor's two entries in the header of a shard, without its data offsets."""
    entry = len(f'"{name}":{{"dtype":"F32","shape":[],"data_offsets":[,]}},') + len(",".join(map(str, shape)))
    sharding = len(f'\\"{name}\\": {{\\"saved_offsets\\": []}}, ') + 3 * len(shape)
    return entry + sharding
