"""``kempnerforge plan``: what a configuration requires on a given number of processes."""

from __future__ import annotations

import shutil
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from kempnerforge.cli.formatting import print_json, size
from kempnerforge.config.overrides import split_positionals
from kempnerforge.config.pipeline_stages import Stage
from kempnerforge.config.schema import JobConfig, load_job
from kempnerforge.errors import EXIT_BAD_CONFIG, ConfigError
from kempnerforge.plan.layout_suggestions import Nearest, nearest_layouts
from kempnerforge.plan.memory import RESERVED_SHARE
from kempnerforge.plan.optimizer_state import BUILT_IN, OptimizerState
from kempnerforge.plan.own_model import plan_own_model
from kempnerforge.plan.report import PipelineRank, Plan, make_plan

app = typer.Typer(add_completion=False)

MOST_GROUPS = 4
"""Maximum number of rank groups to list."""
PIPED_WIDTH = 100


# click must not parse --section.key.
@app.command(context_settings={"ignore_unknown_options": True})
def plan(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="FILE [--section.key=value ...]", help="The TOML file, and overrides."),
    ],
    world_size: Annotated[int, typer.Option(min=1, help="Number of processes, one per device.")],
    ranks_per_node: Annotated[int, typer.Option(min=1, help="Processes per node.")] = 8,
    memory_gb: Annotated[
        float | None, typer.Option(min=0.0, help="Check against this memory per device, in GB (10^9 bytes).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show mesh, stages, memory, checkpoint size and batch of FILE on N processes. Needs no GPU.

    Exit status 2 if the layout is impossible, with a list of the closest possible layouts.
    Exit status 1 if --memory-gb is too small.
    """
    positionals, overrides = split_positionals(arguments)
    if not positionals:
        raise typer.BadParameter("FILE is missing")
    file, overrides = positionals[0], [*overrides, *positionals[1:]]
    try:
        job = load_job(file, overrides, world_size=world_size, inside_job=False).job
    except ConfigError as error:
        _refuse(error, nearest_layouts(file, overrides, world_size), world_size, as_json=as_json)
        raise typer.Exit(EXIT_BAD_CONFIG) from None
    if not job.model.is_llama:
        _plan_own_model(job, file, world_size, ranks_per_node, memory_gb, as_json=as_json)
        return
    result = make_plan(job, world_size, ranks_per_node=ranks_per_node, probed=_probed(job))
    if as_json:
        print_json(result.to_json(memory_gb))
    else:
        _print(result, file, memory_gb)
    if memory_gb is not None and not result.fits(memory_gb):
        raise typer.Exit(1)


def _plan_own_model(
    job: JobConfig, file: str, world_size: int, ranks_per_node: int, memory_gb: float | None, *, as_json: bool
) -> None:
    from kempnerforge.cli.plan_own_model import print_plan
    from kempnerforge.train.own_model import plan_parameters  # imports torch

    stages, activation_bytes = plan_parameters(job)
    result = plan_own_model(
        job,
        job.geometry(world_size),
        stages,
        activation_bytes=activation_bytes,
        ranks_per_node=ranks_per_node,
        probed=_probed(job),
    )
    if as_json:
        print_json(result.to_json())
    else:
        print_plan(result, file, memory_gb)
    if memory_gb is not None and result.device_bytes > (1 - RESERVED_SHARE) * memory_gb * 1e9:
        raise typer.Exit(1)


def _probed(job: JobConfig) -> OptimizerState | None:
    """Return the state of an optimizer that is not one of KempnerForge's own, by a step of a small one."""
    if job.optimizer.name in BUILT_IN:
        return None
    from kempnerforge.train.optimizer_probe import probe  # imports torch

    return probe(job.optimizer)


def _refuse(error: ConfigError, near: Nearest, world_size: int, *, as_json: bool) -> None:
    if as_json:
        faults = [
            {"key": fault.key, "problem": fault.problem, "allowed": fault.allowed} for fault in error.faults
        ]
        nearest = {"overrides": near.overrides, "world_sizes": near.world_sizes}
        print_json({"possible": False, "faults": faults, "nearest": nearest})
        return
    typer.echo(str(error), err=True)
    if near.overrides:
        typer.echo(f"possible with {_processes(world_size)}, closest first:", err=True)
        for overrides in near.overrides:
            typer.echo(f"  {' '.join(overrides)}", err=True)
    if near.world_sizes:
        sizes = ", ".join(map(str, near.world_sizes))
        typer.echo(f"possible without changes: --world-size {sizes}", err=True)


def _print(plan: Plan, file: str, memory_gb: float | None) -> None:
    width = PIPED_WIDTH if not Console().is_terminal else min(PIPED_WIDTH, shutil.get_terminal_size().columns)
    console = Console(width=width, highlight=False)
    mesh = " x ".join(f"{dim} {count}" for dim, count in plan.geometry.mesh.items())
    console.print(f"{file} on {_processes(plan.geometry.world_size)}: {mesh}", soft_wrap=True)
    console.print(_mesh_table(plan))
    console.print(_holdings_table(plan))
    console.print(_memory_table(plan))
    for line in [*_facts(plan), *_verdict(plan, memory_gb)]:
        console.print(line, soft_wrap=True)


def _table(title: str, *columns: str, right: int) -> Table:
    """Return a table whose last ``right`` columns hold numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        is_number = index >= len(columns) - right
        table.add_column(name, justify="right" if is_number else "left", no_wrap=is_number)
    return table


def _mesh_table(plan: Plan) -> Table:
    table = _table("mesh, outermost dimension first", "dimension", "size", "groups of ranks", right=0)
    for dim, count in plan.geometry.mesh.items():
        if count > 1:
            table.add_row(dim, str(count), _groups_in_words(plan.geometry.groups(dim)))
    if plan.geometry.world_size == 1:
        table.add_row("none", "1", "one rank holds everything")
    return table


def _groups_in_words(groups: list[list[int]]) -> str:
    shown = ", ".join(_ranks_in_words(group) for group in groups[:MOST_GROUPS])
    return shown if len(groups) <= MOST_GROUPS else f"{shown}, ... ({len(groups)} groups)"


def _ranks_in_words(ranks: list[int]) -> str:
    """Return ``{0 1}``, or a range with the constant distance of the ranks: ``{0-28 by 4}``."""
    if len(ranks) <= 2:
        return f"[{' '.join(map(str, ranks))}]".replace("[", "{").replace("]", "}")
    step = ranks[1] - ranks[0]
    return f"{{{ranks[0]}-{ranks[-1]}}}" if step == 1 else f"{{{ranks[0]}-{ranks[-1]} by {step}}}"


def _holdings_table(plan: Plan) -> Table:
    geometry = plan.geometry
    shares = [f"1/{geometry.tp} of each matrix (tp)"] if geometry.tp > 1 else []
    shares += [f"1/{geometry.dp_shard} of its rows (fsdp)"] if geometry.dp_shard > 1 else []
    title = f"contents of each rank: {', '.join(shares) if shares else 'whole parameters'}"
    table = _table(title, "ranks", "stages", "parts", "parameters per rank", "in flight", right=2)
    for group in plan.pipeline:
        table.add_row(
            _span(group),
            " ".join(str(stage.index) for stage in group.stages),
            "; ".join(_parts(stage) for stage in group.stages),
            f"{group.parameters:,}",
            str(group.in_flight),
        )
    return table


def _span(group: PipelineRank) -> str:
    return (
        str(group.first_rank)
        if group.first_rank == group.last_rank
        else f"{group.first_rank}-{group.last_rank}"
    )


def _parts(stage: Stage) -> str:
    parts = ["embedding"] if stage.has_embedding else []
    if len(stage.layers) == 1:
        parts.append(f"layer {stage.first_layer}")
    elif stage.layers:
        parts.append(f"layers {stage.first_layer}-{stage.end_layer - 1}")
    return ", ".join([*parts, *(["head"] if stage.has_head else [])])


def _memory_table(plan: Plan) -> Table:
    columns = ("weights", "grads", "optim", "gathered", "activations", "buffers", "working", "total")
    table = _table(
        "device memory per rank in GB at the peak of a step (gathered to working are estimates)",
        "ranks", "peak at", *columns, right=len(columns),
    )  # fmt: skip
    for group in plan.pipeline:
        memory = group.memory
        sizes = (memory.weights, memory.gradients, memory.optimizer, memory.gathered)
        sizes = (*sizes, memory.activations, memory.buffers, memory.working, memory.total)
        table.add_row(_span(group), memory.peak, *(f"{count / 1e9:.2f}" for count in sizes))
    return table


def _facts(plan: Plan) -> list[str]:
    job, geometry, checkpoint = plan.job, plan.geometry, plan.checkpoint
    passes = f"{geometry.accumulation_steps} x batch_size {job.train.batch_size}"
    if geometry.pp > 1:
        passes = f"{geometry.pp_microbatches} x pp_microbatch_size {plan.microbatch_size}"
    facts = [
        f"model        {job.model.num_parameters:,} parameters",
        f"batch        {geometry.global_batch_size} sequences = {plan.tokens_per_step:,} tokens per step",
        f"             {passes} on each of {geometry.dp} data-parallel ranks",
    ]
    if geometry.pp > 1:
        facts.append(
            f"pipeline     {job.distributed.pp_schedule}, {geometry.pp_microbatches} microbatches,"
            f" bubble {100 * plan.bubble_fraction:.1f} % of the time"
        )
    if plan.cheaper_loss is not None:
        other = plan.cheaper_loss
        facts.append(
            f"loss         train.loss {other.name} would need {other.device_bytes / 1e9:.1f} GB per device"
            f" instead of {plan.device_bytes / 1e9:.1f} GB"
        )
    pinned = "pinned" if job.checkpoint.async_mode.value == "async_with_pinned_mem" else "pageable"
    most = max(group.staged_bytes for group in plan.pipeline)
    facts += [
        f"checkpoint   {size(checkpoint.size_bytes)} in {checkpoint.num_files} files; weights and"
        f" optimizer state: {checkpoint.payload_bytes:,} bytes",
        f"staging      {size(most)} of {pinned} host memory per rank,"
        f" {size(plan.staged_on_node_bytes)} per node of {plan.ranks_per_node} ranks",
        f"             checkpoint.async_mode {job.checkpoint.async_mode.value}",
    ]
    if checkpoint.written_bytes < checkpoint.size_bytes:
        facts.insert(
            -2, f"             {size(checkpoint.written_bytes)} of it are written again after the first save"
        )
    if plan.unknown_optimizer:
        facts.append(
            f"optimizer    the state of {job.optimizer.name} is not known and not counted:"
            f" {plan.unknown_optimizer}"
        )
    limit = job.checkpoint.max_host_memory_gb
    if limit is not None and plan.staged_on_node_bytes > limit * 1e9:
        facts.append(f"             more than checkpoint.max_host_memory_gb {limit}: the run would not start")
    return facts


def _verdict(plan: Plan, memory_gb: float | None) -> list[str]:
    need = plan.device_bytes / 1e9
    if memory_gb is None:
        return [f"device       at least {need:.1f} GB; give --memory-gb to compare"]
    usable = (1 - RESERVED_SHARE) * memory_gb
    answer = "fits" if plan.fits(memory_gb) else "does not fit"
    reserve = f"{100 * RESERVED_SHARE:.0f} % reserved for CUDA, NCCL, fragmentation"
    return [f"device       {answer}: {need:.1f} GB of {usable:.1f} GB usable ({memory_gb:g} GB; {reserve})"]


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"
