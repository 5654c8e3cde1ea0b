"""Check a model of the user's against the job, before anything is started or queued."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from kempnerforge.config.schema import JobConfig
from kempnerforge.errors import ConfigError, ConfigIssue
from kempnerforge.model.build import BuiltModel, build_meta, computes_loss, naming_errors, repeated_blocks
from kempnerforge.plan.tensors import Parameter
from kempnerforge.train.model_setup import loss_issues, make_stage_modules
from kempnerforge.train.optimizer import hidden_matrices, parameter_groups


@dataclass(frozen=True)
class OwnModel:
    """What a model of the user's is."""

    num_parameters: int
    num_blocks: int
    """Number of modules that are sharded, recomputed and compiled one by one."""
    methods: tuple[str, ...]
    """The optional methods that it has."""


OPTIONAL_METHODS = (
    *("loss", "fsdp_units", "tp_plan", "after_tensor_parallel", "pipeline_stages", "stage_output_shape"),
    *("flops_per_token", "activation_bytes", "init_weights"),
)


def check_own_model(job: JobConfig) -> OwnModel:
    """Build the model of ``job`` without allocating its parameters, and check it.

    Raises ConfigError if it cannot be built, if one of its optional methods raises an exception, if
    the layout needs a plan or stages that it does not have, if modules that are sharded one by one
    share a weight, if a group of the optimizer matches none of its parameters, or if it does not
    return logits for tokens.
    """
    built = build_meta(job.model, seed=job.train.seed)
    module = built.module
    issues = loss_issues(job, module)
    if job.distributed.tp > 1 and not _has(module, "tp_plan"):
        problem = f"{job.distributed.tp} needs a plan, and {job.model.name} has no tp_plan()"
        issues.append(ConfigIssue("distributed.tp", problem, "set tp = 1, or give the model a plan"))
    try:
        has_stages = job.distributed.pp > 1 and not issues
        for part in make_stage_modules(job, built) if has_stages else [module]:
            issues += _shared_weight_issues(part)
            if job.distributed.tp > 1 and _has(part, "tp_plan"):
                _tp_plan(part)
    except ConfigError as error:
        issues += error.faults
    try:
        parameter_groups([module], job.optimizer)
    except ConfigError as error:
        issues += error.faults
    if issue := _output_issue(job, built):
        issues.append(issue)
    if issues:
        raise ConfigError(issues)
    methods = tuple(name for name in OPTIONAL_METHODS if _has(module, name))
    return OwnModel(built.num_parameters, len(repeated_blocks(module)), methods)


def plan_parameters(job: JobConfig) -> tuple[list[list[Parameter]], int | None]:
    """Return the parameters of each pipeline stage, and what a micro-batch keeps for its backward pass.

    The second is what ``activation_bytes(batch_size, seq_len)`` of the model returns; None without it.
    Raises ConfigError as ``check_own_model`` does.
    """
    check_own_model(job)
    built = build_meta(job.model, seed=job.train.seed)
    module = built.module
    stages = make_stage_modules(job, built) if job.distributed.pp > 1 else [module]
    hidden = hidden_matrices([module])
    parameters = [
        [
            Parameter(
                name,
                tuple(param.shape),
                _tp_dim(stage, name, tp=job.distributed.tp),
                name in hidden,
                frozen=not param.requires_grad,
            )
            for name, param in stage.named_parameters()
        ]
        for stage in stages
    ]
    if not _has(module, "activation_bytes"):
        return parameters, None
    micro = job.distributed.pp_microbatch_size or 1 if job.distributed.pp > 1 else job.train.batch_size
    with naming_errors(f"activation_bytes() of {job.model.name}"):
        return parameters, int(cast("Any", module).activation_bytes(micro, job.train.seq_len))


def _shared_weight_issues(model: nn.Module) -> list[ConfigIssue]:
    """Return an issue for each parameter of modules that FSDP shards one by one, which it refuses."""
    units = dict.fromkeys([*repeated_blocks(model), model])
    names = {module: name or "the rest of the model" for name, module in model.named_modules()}
    sharded_with: dict[nn.Parameter, list[str]] = {}
    for unit in units:
        for inner in dict.fromkeys(_modules_of_unit(unit, units)):
            for param in inner.parameters(recurse=False):
                sharded_with.setdefault(param, []).append(names[unit])
    hint = "let fsdp_units() return neither, or one module that contains both"
    issues = []
    for name, param in model.named_parameters():
        if len(owners := list(dict.fromkeys(sharded_with[param]))) > 1:
            problem = f"{name} is shared by {owners[0]} and {owners[1]}, which are sharded one by one"
            issues.append(ConfigIssue("model.name", problem, hint))
    return issues


def _modules_of_unit(module: nn.Module, units: Mapping[nn.Module, None]) -> Iterator[nn.Module]:
    """Yield ``module`` and the modules inside it, without those that are sharded on their own."""
    yield module
    for child in module.children():
        if child not in units:
            yield from _modules_of_unit(child, units)


def _tp_plan(module: nn.Module) -> dict[str, Any]:
    """Return the plan of a model or a stage for tensor parallelism. Raises ConfigError."""
    with naming_errors(f"tp_plan() of {type(module).__name__}"):
        return dict(cast("Any", module).tp_plan())


def _tp_dim(module: nn.Module, name: str, *, tp: int) -> int | None:
    """Return the dimension in which ``tp_plan`` shards a parameter; None if every tp rank has it whole."""
    if tp == 1:
        return None
    owner, _, leaf = name.rpartition(".")
    for pattern, style in _tp_plan(module).items():
        parts, tokens = pattern.split("."), owner.split(".")
        if len(parts) != len(tokens) or not all(map(fnmatch, tokens, parts)):
            continue
        is_embedding = isinstance(module.get_submodule(owner), nn.Embedding)
        if isinstance(style, ColwiseParallel):
            return 1 if is_embedding else 0
        if isinstance(style, RowwiseParallel):
            return 0 if is_embedding else (1 if leaf == "weight" else None)
    return None


def _has(module: nn.Module, name: str) -> bool:
    return callable(getattr(module, name, None))


def _output_issue(job: JobConfig, built: BuiltModel) -> ConfigIssue | None:
    """Return why the model is not one from tokens to logits, tried on the meta device.

    A model that needs the values of its inputs cannot be tried there. Its first step finds it out.
    """
    if computes_loss(built.module):
        return None
    name, seq_len = job.model.name, job.train.seq_len
    if type(built.module).forward is nn.Module.forward:
        return ConfigIssue("model.name", f"{name} has neither forward() nor loss()", "write one of them")
    try:
        with torch.device("meta"), torch.no_grad():
            logits: Any = built.module(torch.zeros(1, seq_len, dtype=torch.int64))
    except TypeError as error:
        return ConfigIssue("model.name", f"{name} cannot be called with tokens: {error}")
    except Exception as error:  # noqa: BLE001 - the user's code may raise anything
        if "meta" in str(error).lower() or isinstance(error, NotImplementedError):
            return None
        problem = f"{name} raised {type(error).__name__} for {seq_len} tokens: {error}"
        return ConfigIssue("model.name", problem, "see train.seq_len and model.args")
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != (1, seq_len):
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        problem = f"{name} returned {shape} for tokens [1, {seq_len}]"
        return ConfigIssue("model.name", problem, "forward() returns logits [B, T, V]")
    if job.data.text is not None and job.data.tokenizer == "bytes" and logits.size(2) < 257:
        problem = f"{name} returned logits of {logits.size(2)} ids"
        return ConfigIssue("model.name", problem, 'the "bytes" tokenizer has 257')
    return None
