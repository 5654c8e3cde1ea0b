"""The parts of the model on this rank, and its training step: everything that depends on the layout."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from kempnerforge.config.pipeline_stages import num_stages
from kempnerforge.config.schema import JobConfig, ParallelDims, TrainConfig
from kempnerforge.distributed import timeouts
from kempnerforge.distributed.consensus import ControlGroup
from kempnerforge.distributed.mesh import build_mesh
from kempnerforge.errors import ConfigError, ConfigIssue
from kempnerforge.model.build import (
    BuiltModel,
    build_meta,
    computes_loss,
    copy_requires_grad,
    naming_errors,
)
from kempnerforge.parallel.initial_weights import init_weights_
from kempnerforge.parallel.shard import materialize, parallelize
from kempnerforge.train.loss import Loss, build_loss
from kempnerforge.train.loss_step import LossStep
from kempnerforge.train.optimizer import Optimizers, ParameterGroup, parameter_groups
from kempnerforge.train.step import LocalStep, TrainStep

if TYPE_CHECKING:
    from kempnerforge.parallel.pipeline import Pipeline


@dataclass(frozen=True)
class ParallelModel:
    """A rank's parts of the model, sharded and allocated."""

    parts: Sequence[nn.Module]
    """The whole model, or the pipeline stages of this rank."""
    groups: list[ParameterGroup]
    """The optimizer's groups, with all parameters of the **whole** model."""
    pipeline: Pipeline | None
    device: torch.device
    num_parameters: int
    """Number of elements of the whole model's parameters."""
    loss: Loss

    def flops_per_token(self, seq_len: int) -> float | None:
        """Return the model FLOPs per training token; None if the model does not tell."""
        flops: Any = getattr(self.parts[0], "flops_per_token", None)
        result: Any = flops(seq_len) if callable(flops) else None
        return result

    def step(
        self, optimizer: Optimizers, geometry: ParallelDims, train: TrainConfig, *, num_sources: int = 0
    ) -> TrainStep:
        """Return the training step of this rank. ``num_sources`` asks for the loss of each source."""
        assert dist.group.WORLD is not None
        options = {
            "device": self.device,
            "group": dist.group.WORLD,
            "grad_clip_norm": train.grad_clip_norm,
            "loss_copies": geometry.tp,
            "loss": self.loss,
            "num_sources": num_sources,
        }
        if self.pipeline is not None:
            # Imported here: torch's pipelining imports the compiler, which takes half a second.
            from kempnerforge.train.pipeline_step import PipelineStep

            return PipelineStep(self.pipeline, optimizer, **options)
        kind = LossStep if computes_loss(self.parts[0]) else LocalStep
        return kind(self.parts[0], optimizer, **options)


def build_model(
    job: JobConfig,
    geometry: ParallelDims,
    *,
    rank: int,
    device: torch.device,
    init_weights: bool,
    control: ControlGroup | None = None,
    has_tokens: bool = True,
) -> ParallelModel:
    """Build the parts of the model of ``rank``.

    ``control`` is needed for the initial weights of a model of the user's. Without ``init_weights``
    the weights must be loaded before anything reads them. ``has_tokens`` says whether the samples
    of the data are token ids, not dicts.

    Collective: all ranks. Raises ConfigError on all ranks for a model that does not fit the layout
    or the loss.
    """
    loss = build_loss(job.train, job.distributed)
    mesh = build_mesh(
        device.type,
        dp_replicate=geometry.dp_replicate,
        dp_shard=geometry.dp_shard,
        tp=geometry.tp,
        pp=geometry.pp,
    )
    whole = build_meta(job.model, seed=job.train.seed)
    if issues := loss_issues(job, whole.module, has_tokens=has_tokens):
        raise ConfigError(issues)
    names = [name for name, _ in whole.module.named_parameters()]
    groups = parameter_groups([whole.module], job.optimizer)
    loss.check_model(whole.module)
    parts, pipeline = [whole.module], None
    if geometry.pp > 1:
        group = mesh.get_group("pp")
        parts, pipeline = _pipeline(job, geometry, whole, loss, rank=rank, device=device, group=group)
    for part in parts:
        parallelize(part, mesh, job.train)
        materialize(part, device, buffers=whole.buffers)
    timeouts.give_all_groups_the_default_timeout()  # includes the groups of sharding and pipelining
    if init_weights:
        seed = job.train.seed
        init_weights_(parts, job.model, seed=seed, names=names, control=control or ControlGroup(None))
    return ParallelModel(parts, groups, pipeline, device, whole.num_parameters, loss)


def loss_issues(job: JobConfig, module: nn.Module, *, has_tokens: bool = True) -> list[ConfigIssue]:
    """Return why data or layout do not suit the way in which the model computes its loss."""
    name = job.model.name
    if not computes_loss(module):
        if has_tokens:
            return document_mask_issues(job, module)
        problem = f"samples of {job.data.dataset} are dicts, and {name} has no loss(batch)"
        hint = "give the model a method loss(batch), or return token ids"
        return [ConfigIssue("data.dataset", problem, hint)]
    issues = [
        ConfigIssue(f"train.{key}", f"{name} has a loss(batch), which is used instead", "leave it out")
        for key in ("loss", "loss_args", "z_loss")
        if getattr(job.train, key) != getattr(TrainConfig(), key)
    ]
    if job.distributed.pp > 1:
        problem = f"{job.distributed.pp} needs a model from tokens to logits, and {name} has a loss(batch)"
        issues.append(ConfigIssue("distributed.pp", problem, "set pp = 1"))
    return issues


def document_mask_issues(job: JobConfig, module: nn.Module) -> list[ConfigIssue]:
    """Return why a model, or a pipeline stage of one, cannot keep attention within documents."""
    if not job.data.document_mask or "document_ids" in inspect.signature(module.forward).parameters:
        return []
    problem = f"forward() of {type(module).__name__} ({job.model.name}) has no argument document_ids"
    hint = "set it to false, or write forward(self, tokens, document_ids=None): docs/guide/own-model.md"
    return [ConfigIssue("data.document_mask", problem, hint)]


def _pipeline(
    job: JobConfig,
    geometry: ParallelDims,
    whole: BuiltModel,
    loss: Loss,
    *,
    rank: int,
    device: torch.device,
    group: dist.ProcessGroup,
) -> tuple[list[nn.Module], Pipeline]:
    """Return the stages of ``rank``, not sharded yet, and the pipeline that they form."""
    from kempnerforge.parallel.pipeline import Pipeline, border_tensors

    stages = make_stage_modules(job, whole)
    # Every rank checks the stages of the last one, which computes the loss, so that all raise together.
    for stage in stages[geometry.pp - 1 :: geometry.pp]:
        loss.check_model(stage)
    pp_rank = geometry.pp_rank(rank)
    own = list(range(pp_rank, len(stages), geometry.pp))  # interleaved as in Megatron
    microbatch_size = job.distributed.pp_microbatch_size or 1
    borders = border_tensors(
        stages,
        batch_size=microbatch_size,
        seq_len=job.train.seq_len,
        dtype=torch.bfloat16 if job.train.mixed_precision == "bf16" else torch.float32,
        tp=geometry.tp,
    )
    parts = [stages[number] for number in own]
    pipeline = Pipeline(
        parts=parts,
        stage_numbers=own,
        num_stages=len(stages),
        schedule=job.distributed.pp_schedule,
        microbatches=geometry.pp_microbatches,
        microbatch_size=microbatch_size,
        borders=borders,
        device=device,
        group=group,
    )
    return parts, pipeline


def make_stage_modules(job: JobConfig, whole: BuiltModel) -> list[nn.Module]:
    """Return all pipeline stages of a model, on the meta device.

    Raises ConfigError if the model has no ``pipeline_stages``, if that raises an exception, or if its
    stages do not have the parameters and the names of the whole model.
    """
    name, count = job.model.name, num_stages(job.distributed)
    divide: Any = getattr(whole.module, "pipeline_stages", None)
    if not callable(divide):
        problem = f"{job.distributed.pp} needs stages, and {name} has no pipeline_stages()"
        raise ConfigError([ConfigIssue("distributed.pp", problem, "set pp = 1, or give the model stages")])
    sizes = job.distributed.pp_layers
    with torch.device("meta"), naming_errors(f"{name}.pipeline_stages({count})"):
        divided: Any = divide(count) if sizes is None else divide(count, sizes)
        stages: list[nn.Module] = list(divided)
        staged = [(key, param.shape) for stage in stages for key, param in stage.named_parameters()]
    shapes = {key: param.shape for key, param in whole.module.named_parameters()}
    if len(stages) != count or sorted(staged) != sorted(shapes.items()):
        problem = f"{name}.pipeline_stages({count}) returned {len(stages)} stages whose parameters differ"
        hint = "each parameter of the model must be in one stage, under the name it has in the model"
        raise ConfigError([ConfigIssue("model.name", problem, hint)])
    if issues := [issue for stage in stages for issue in document_mask_issues(job, stage)][:1]:
        raise ConfigError(issues)
    trained = {key: param.requires_grad for key, param in whole.module.named_parameters()}
    for stage in stages:
        copy_requires_grad(trained, stage)
    return stages
