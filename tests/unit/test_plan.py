"""The arithmetic of ``kempnerforge plan``, against real models, autograd, schedules and checkpoints."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from support.step_memory import block_and_input, fused_norm_forward, kept_by_autograd
from torch import Tensor, nn
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining.stage import _PipelineStageBase

from kempnerforge.checkpoint.format.safetensors_file import ShardItem
from kempnerforge.checkpoint.save.commit import PlannedItem
from kempnerforge.checkpoint.save.plan import make_plan as make_save_plan
from kempnerforge.config.pipeline_stages import STAGES_PER_RANK, make_stages
from kempnerforge.config.schema import (
    DistributedConfig,
    JobConfig,
    ModelConfig,
    ParallelDims,
    TrainConfig,
    load_job,
)
from kempnerforge.model.layers import RotaryEmbedding, TransformerBlock
from kempnerforge.model.llama import Llama
from kempnerforge.model.recompute import Recompute
from kempnerforge.plan import activations, tensors
from kempnerforge.plan.checkpoint_size import RNG_BYTES, staged_bytes, staged_on_node
from kempnerforge.plan.memory import device_memory
from kempnerforge.plan.moments import local_moments, pipeline_moments
from kempnerforge.plan.optimizer_state import FP32
from kempnerforge.plan.pipeline import bubble_fraction, in_flight
from kempnerforge.plan.report import make_plan

pytest_plugins = ["support.run_fixtures"]

CONFIGS = Path(__file__).parents[2] / "configs"
UNEVEN = ModelConfig(
    dim=36, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=2, ffn_hidden_dim=50, vocab_size=67, max_seq_len=16
)


def geometry(*, pp: int = 1, dp_replicate: int = 1, dp_shard: int = 1, tp: int = 1) -> ParallelDims:
    return ParallelDims(dp_replicate, dp_shard, dp_replicate * dp_shard, tp, pp, 1, 1)


def model_of(name: str) -> ModelConfig:
    return load_job(CONFIGS / f"{name}.toml").job.model


def test_geometry_coordinates_match_torch_mesh() -> None:
    layout = geometry(pp=2, dp_replicate=2, dp_shard=3, tp=2)
    mesh = torch.arange(24).view(*layout.mesh.values())
    for rank in range(24):
        assert mesh[tuple(layout.coordinate(rank).values())] == rank
    for place, dim in enumerate(layout.mesh):
        rows = mesh.movedim(place, -1).reshape(-1, layout.mesh[dim])
        assert sorted(layout.groups(dim)) == sorted(rows.tolist())


@pytest.mark.parametrize("model", ["llama_7b", "llama_13b", "llama_70b", "llama_1b", None])
def test_plan_parameters_match_real_model(model: str | None) -> None:
    config = UNEVEN if model is None else model_of(model)
    with torch.device("meta"):
        real = {name: tuple(one.shape) for name, one in Llama(config).named_parameters()}
    [stage] = make_stages(config, DistributedConfig())
    counted = tensors.stage_parameters(config, stage)
    assert {one.name: one.shape for one in counted} == real
    assert sum(one.numel for one in counted) == config.num_parameters


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("llama_7b", geometry(pp=2, dp_shard=3, tp=4)),
        ("llama_13b", geometry(pp=4, dp_shard=7, tp=2)),
        ("llama_70b", geometry(pp=4, dp_shard=2, tp=8)),
        ("llama_7b", geometry(dp_replicate=4, dp_shard=8)),
        (None, geometry(pp=3, dp_shard=4, tp=2)),
    ],
)
def test_plan_local_numel_matches_torch_chunks(model: str | None, layout: ParallelDims) -> None:
    """What ranks have is what chunks of the real model have, and it adds up."""
    config = UNEVEN if model is None else model_of(model)
    with torch.device("meta"):
        real = dict(Llama(config).named_parameters())
    distributed = DistributedConfig(pp=layout.pp)
    held, copies = 0, 0
    for stage in make_stages(config, distributed):
        parameters = tensors.stage_parameters(config, stage)
        largest = tensors.local_numel(parameters, layout)
        for tp_rank, shard_rank in itertools.product(range(layout.tp), range(layout.dp_shard)):
            mine = tensors.local_numel(parameters, layout, tp_rank=tp_rank, shard_rank=shard_rank)
            assert mine <= largest
            counted = 0
            for one in parameters:
                piece = real[one.name]
                if one.tp_dim is not None:
                    piece = piece.chunk(layout.tp, one.tp_dim)[tp_rank]
                pieces = piece.chunk(layout.dp_shard, 0)
                counted += pieces[shard_rank].numel() if shard_rank < len(pieces) else 0
            assert mine == counted
            held += mine
        copies += (layout.tp - 1) * sum(one.numel for one in parameters if one.tp_dim is None)
    assert held - copies == config.num_parameters


def kept_for_recomputation(block: TransformerBlock, inputs: tuple[Tensor, ...]) -> int:
    """Bytes that checkpointing holds on to, in Python: the input, and results that are not repeated."""

    gc.collect()
    gc.freeze()  # what there is already is not looked at again
    try:
        out = block(*inputs)
        storages = [one.untyped_storage() for one in gc.get_objects() if type(one) is Tensor]
    finally:
        gc.unfreeze()
    result = out.untyped_storage().data_ptr()
    kept = {one.data_ptr(): one.nbytes() for one in storages if one.nbytes() and one.data_ptr() != result}
    return sum(kept.values()) + inputs[0].untyped_storage().nbytes()


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("n_kv_heads", [8, 2])
def test_plan_activations_match_autograd(
    monkeypatch: pytest.MonkeyPatch, checkpointing: Recompute, precision: str, n_kv_heads: int
) -> None:
    monkeypatch.setattr(nn.RMSNorm, "forward", fused_norm_forward)
    model = ModelConfig(
        dim=64, n_layers=1, n_heads=8, n_kv_heads=n_kv_heads, head_dim=16, ffn_hidden_dim=176, max_seq_len=32
    )
    train = TrainConfig.model_validate(
        {"activation_checkpointing": checkpointing, "mixed_precision": precision}
    )
    block, inputs = block_and_input(model, train)
    count = kept_by_autograd if checkpointing == "none" else kept_for_recomputation
    assert count(block, inputs) == 2 * 32 * activations.kept_by_layer(model, train, 1)


class _Stage(_PipelineStageBase):
    """As much of a stage as a schedule looks at to make its order."""

    def __init__(self, index: int, pp: int, count: int) -> None:
        self.stage_index, self.num_stages = index, count
        self.group_size, self.group_rank, self.submod = pp, index % pp, None  # type: ignore[assignment]

    def _create_grad_recv_info(self, *_: object) -> tuple[object, ...]:  # type: ignore[override]
        return ()

    def _prepare_forward_infra(self, *_: object) -> tuple[object, ...]:  # type: ignore[override]
        return ()

    def _prepare_backward_infra(self, *_: object) -> None:  # type: ignore[override]
        return None


@pytest.mark.parametrize(("pp", "microbatches"), [(2, 2), (2, 8), (4, 4), (4, 8), (8, 16)])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "interleaved_1f1b"])
def test_plan_in_flight_matches_torch_schedules(schedule: str, pp: int, microbatches: int) -> None:
    distributed = DistributedConfig.model_validate({"pp": pp, "pp_schedule": schedule})
    count = pp * STAGES_PER_RANK[schedule]
    stages = [_Stage(index, pp, count) for index in range(0, count, pp)]
    if schedule == "interleaved_1f1b":
        order = ScheduleInterleaved1F1B(stages, microbatches).pipeline_order  # type: ignore[arg-type]
    else:
        kind = Schedule1F1B if schedule == "1f1b" else ScheduleGPipe
        order = kind(stages[0], microbatches)._get_pipeline_order()
    assert order is not None
    for pp_rank in range(pp):
        alive, most = 0, 0
        for action in filter(None, order[pp_rank]):
            alive += {"FORWARD": 1, "FULL_BACKWARD": -1}.get(action.computation_type.name, 0)
            most = max(most, alive)
        assert alive == 0
        assert in_flight(distributed, microbatches, pp_rank) == most


def test_plan_bubble_fraction_matches_paper() -> None:
    assert bubble_fraction(DistributedConfig(), 1) == 0
    assert bubble_fraction(DistributedConfig(pp=4), 4) == 3 / 7
    assert bubble_fraction(DistributedConfig(pp=4, pp_schedule="interleaved_1f1b"), 4) == 3 / 11


@pytest.mark.parametrize(
    "layout",
    [
        geometry(tp=2),
        geometry(dp_shard=3, tp=2),
        geometry(dp_replicate=3, dp_shard=2, tp=2),
        geometry(pp=3, dp_replicate=2, dp_shard=2),
    ],
)
def test_plan_staged_bytes_match_save_plan(layout: ParallelDims) -> None:
    distributed = DistributedConfig(
        pp=layout.pp, tp=layout.tp, dp_replicate=layout.dp_replicate, dp_shard=layout.dp_shard
    )
    job = JobConfig.model_validate(
        {
            "data": {"text": "python-stdlib"},
            "model": UNEVEN.model_copy(update={"vocab_size": 301}).model_dump(),
            "distributed": distributed.model_dump(),
            "train": {"seq_len": 16},
        }
    )
    stages = make_stages(job.model, distributed)
    held_by_rank: list[list[PlannedItem]] = []
    for rank in range(layout.world_size):
        place = layout.coordinate(rank)
        held = []
        for one in tensors.stage_parameters(job.model, stages[place["pp"]]):
            cut = tensors.tp_shape(one, layout.tp, place["tp"])
            shape = tensors.local_shape(one, layout, tp_rank=place["tp"], shard_rank=place["dp_shard"])
            offsets = [0] * len(shape)
            if one.tp_dim is not None:
                pieces = tensors.chunk_lengths(one.shape[one.tp_dim], layout.tp)
                offsets[one.tp_dim] = sum(pieces[: place["tp"]])
            offsets[0] += sum(tensors.chunk_lengths(cut[0], layout.dp_shard)[: place["dp_shard"]])
            if math.prod(shape):
                item = (tuple(offsets), shape)
                held += [
                    PlannedItem(ShardItem(f"{name}.{one.name}", "F32", *item), one.shape) for name in "wmv"
                ]
        held_by_rank.append(held)
    saved = make_save_plan(held_by_rank)
    written = [sum(i.item.size_bytes for file in of_rank for i in file.items) for of_rank in saved.files]
    largest = max(i.item.size_bytes for held in held_by_rank for i in held)
    a_stage = layout.world_size // layout.pp
    staged = [staged_bytes(job, layout, pp_rank) for pp_rank in range(layout.pp)]
    for pp_rank in range(layout.pp):
        most = max(written[pp_rank * a_stage : (pp_rank + 1) * a_stage])
        assert staged[pp_rank] - RNG_BYTES == pytest.approx(most, abs=largest)
        if layout.dp_replicate == 1:
            norms = 3 * FP32 * sum(one.numel for one in _norms(job.model, stages[pp_rank]))
            assert abs(staged[pp_rank] - RNG_BYTES - most) <= norms
    assert staged_on_node(staged, layout, a_stage) == max(staged) * a_stage
    assert staged_on_node(staged, layout, layout.world_size) == sum(staged) * a_stage


def _norms(model: ModelConfig, stage: object) -> list[tensors.Parameter]:
    return [one for one in tensors.stage_parameters(model, stage) if one.tp_dim is None]  # type: ignore[arg-type]


def test_plan_state_16_bytes_per_parameter_over_shards() -> None:
    """With accumulation, where the gradients of earlier micro-batches are there at every moment."""
    job = load_job(CONFIGS / "llama_7b.toml").job
    for layout in (geometry(), geometry(dp_shard=8)):
        memory = device_memory(job, dataclasses.replace(layout, accumulation_steps=2), 0)
        state = memory.weights + memory.gradients + memory.optimizer
        assert state == 16 * job.model.num_parameters // layout.dp_shard


def test_plan_gradients_absent_at_loss_of_one_pass() -> None:
    job = load_job(CONFIGS / "llama_7b.toml").job
    memory = device_memory(job, geometry(dp_shard=8), 0)
    assert (memory.peak, memory.gradients) == ("loss", 0)
    assert memory.weights + memory.optimizer == 12 * job.model.num_parameters // 8


@pytest.mark.parametrize("pp", [1, 2])
def test_plan_document_mask_adds_rotary_tables(pp: int) -> None:
    """Those of each microbatch in flight."""
    most = []
    for mask in (False, True):
        job = JobConfig.model_validate(
            {
                "data": {"text": "python-stdlib", "document_mask": mask},
                "train": {"batch_size": 2 * pp, "seq_len": 64},
                "distributed": {"pp": pp, "pp_microbatch_size": 2 if pp > 1 else None},
            }
        )
        layout, stages = job.geometry(pp), make_stages(job.model, job.distributed)[:1]
        found = pipeline_moments(job, layout, stages, 0) if pp > 1 else local_moments(job, layout, stages[0])
        most.append(max(moment.activations for moment in found))
    tables = RotaryEmbedding(job.model)(64, torch.zeros(2, 64, dtype=torch.int64))
    assert most[1] - most[0] == pp * sum(table.nbytes for table in tables)


def test_plan_memory_saving_options_reduce_need() -> None:
    """What each way to save memory is there for; all else equal."""

    def need(world_size: int, **changes: Mapping[str, object]) -> int:
        tree = load_job(CONFIGS / "llama_7b.toml").job.model_dump(mode="json")
        for section, keys in changes.items():
            tree[section] |= keys
        return make_plan(JobConfig.model_validate(tree), world_size).device_bytes

    def layout(**keys: object) -> dict[str, object]:
        return {"dp_replicate": 1, "dp_shard": -1, **keys}

    base = need(8, distributed=layout())
    for name, less in {
        "none": need(
            8, distributed=layout(), train={"activation_checkpointing": "none", "compile_model": False}
        ),
        "one": need(1, distributed=layout()),
        "fp32": need(8, distributed=layout(), train={"mixed_precision": "fp32"}),
    }.items():
        assert base < less, name
    assert need(8, distributed=layout(), train={"activation_checkpointing": "full"}) < base
    assert need(8, distributed=layout(), train={"batch_size": 1}) < base
    assert need(16, distributed=layout(tp=2)) < base
    deep = {"batch_size": 16}
    one_by_one = need(16, distributed=layout(pp=4), train=deep)
    assert one_by_one < need(16, distributed=layout(pp=4, pp_schedule="gpipe"), train=deep)
    assert one_by_one < need(16, distributed=layout(pp=4, pp_schedule="interleaved_1f1b"), train=deep)
    assert one_by_one < need(16, distributed=layout(pp=4, pp_microbatch_size=4), train=deep)
