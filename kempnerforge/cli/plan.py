"""``kempnerforge plan``: what a configuration needs on a number of processes."""

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
from kempnerforge.config.schema import load_job
from kempnerforge.errors import EXIT_BAD_CONFIG, ConfigError
from kempnerforge.plan.layout_suggestions import Nearest, nearest_layouts
from kempnerforge.plan.memory import RESERVED_SHARE
from kempnerforge.plan.report import PipelineRank, Plan, make_plan

app = typer.Typer(add_completion=False)

MOST_GROUPS = 4
"""Groups of ranks that are spelled out."""
PIPED_WIDTH = 100


# click must leave --section.key alone.
@app.command(context_settings={"ignore_unknown_options": True})
def plan(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="FILE [--section.key=value ...]", help="The TOML file, and overrides."),
    ],
    world_size: Annotated[int, typer.Option(min=1, help="Number of processes, one a device.")],
    ranks_per_node: Annotated[int, typer.Option(min=1, help="Processes of one node.")] = 8,
    memory_gb: Annotated[
        float | None, typer.Option(min=0.0, help="Memory of a device in GB (10^9): does it fit?")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Mesh, stages, memory, checkpoint size and batch of FILE on N processes. Needs no GPU.

    Exit status 2 for a layout that is not possible, with the nearest ones that are; 1 when --memory-gb is too
    little.
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
    found = make_plan(job, world_size, ranks_per_node=ranks_per_node)
    if as_json:
        print_json(found.to_json(memory_gb))
    else:
        _print(found, file, memory_gb)
    if memory_gb is not None and not found.fits(memory_gb):
        raise typer.Exit(1)


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
        typer.echo(f"possible with {_processes(world_size)}, nearest first:", err=True)
        for overrides in near.overrides:
            typer.echo(f"  {' '.join(overrides)}", err=True)
    if near.world_sizes:
        sizes = ", ".join(map(str, near.world_sizes))
        typer.echo(f"possible as it is: --world-size {sizes}", err=True)


def _print(found: Plan, file: str, memory_gb: float | None) -> None:
    width = PIPED_WIDTH if not Console().is_terminal else min(PIPED_WIDTH, shutil.get_terminal_size().columns)
    console = Console(width=width, highlight=False)
    mesh = " x ".join(f"{dim} {count}" for dim, count in found.geometry.mesh.items())
    console.print(f"{file} on {_processes(found.geometry.world_size)}: {mesh}", soft_wrap=True)
    console.print(_mesh_table(found))
    console.print(_holdings_table(found))
    console.print(_memory_table(found))
    for line in [*_facts(found), *_verdict(found, memory_gb)]:
        console.print(line, soft_wrap=True)


def _table(title: str, *columns: str, right: int) -> Table:
    """A table whose last ``right`` columns hold numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(columns):
        is_number = place >= len(columns) - right
        table.add_column(name, justify="right" if is_number else "left", no_wrap=is_number)
    return table


def _mesh_table(found: Plan) -> Table:
    table = _table("mesh, the outermost dimension first", "dimension", "size", "groups of ranks", right=0)
    for dim, count in found.geometry.mesh.items():
        if count > 1:
            table.add_row(dim, str(count), _groups_in_words(found.geometry.groups(dim)))
    if found.geometry.world_size == 1:
        table.add_row("none", "1", "one rank holds everything")
    return table


def _groups_in_words(groups: list[list[int]]) -> str:
    shown = ", ".join(_ranks_in_words(group) for group in groups[:MOST_GROUPS])
    return shown if len(groups) <= MOST_GROUPS else f"{shown}, ... ({len(groups)} groups)"


def _ranks_in_words(ranks: list[int]) -> str:
    """``0 1``, or with the step that ranks of a group always have: ``0-28 by 4``."""
    if len(ranks) <= 2:
        return f"[{' '.join(map(str, ranks))}]".replace("[", "{").replace("]", "}")
    step = ranks[1] - ranks[0]
    return f"{{{ranks[0]}-{ranks[-1]}}}" if step == 1 else f"{{{ranks[0]}-{ranks[-1]} by {step}}}"


def _holdings_table(found: Plan) -> Table:
    geometry = found.geometry
    cut = [f"1/{geometry.tp} of each matrix (tp)"] if geometry.tp > 1 else []
    cut += [f"1/{geometry.dp_shard} of its rows (fsdp)"] if geometry.dp_shard > 1 else []
    title = f"who holds what: {', '.join(cut) if cut else 'whole parameters'}"
    table = _table(title, "ranks", "stages", "parts", "parameters a rank", "in flight", right=2)
    for place in found.pipeline:
        table.add_row(
            _span(place),
            " ".join(str(stage.index) for stage in place.stages),
            "; ".join(_parts(stage) for stage in place.stages),
            f"{place.parameters:,}",
            str(place.in_flight),
        )
    return table


def _span(place: PipelineRank) -> str:
    return (
        str(place.first_rank)
        if place.first_rank == place.last_rank
        else f"{place.first_rank}-{place.last_rank}"
    )


def _parts(stage: Stage) -> str:
    parts = ["embedding"] if stage.has_embedding else []
    if len(stage.layers) == 1:
        parts.append(f"layer {stage.first_layer}")
    elif stage.layers:
        parts.append(f"layers {stage.first_layer}-{stage.end_layer - 1}")
    return ", ".join([*parts, *(["head"] if stage.has_head else [])])


def _memory_table(found: Plan) -> Table:
    columns = ("weights", "grads", "optim", "gathered", "activations", "buffers", "working", "total")
    table = _table(
        "device memory of a rank in GB at the peak of a step; estimated from gathered on",
        "ranks", "peak at", *columns, right=len(columns),
    )  # fmt: skip
    for place in found.pipeline:
        memory = place.memory
        sizes = (memory.weights, memory.gradients, memory.optimizer, memory.gathered)
        sizes = (*sizes, memory.activations, memory.buffers, memory.working, memory.total)
        table.add_row(_span(place), memory.peak, *(f"{count / 1e9:.2f}" for count in sizes))
    return table


def _facts(found: Plan) -> list[str]:
    job, geometry, checkpoint = found.job, found.geometry, found.checkpoint
    passes = f"{geometry.accumulation_steps} x batch_size {job.train.batch_size}"
    if geometry.pp > 1:
        passes = f"{geometry.pp_microbatches} x pp_microbatch_size {found.microbatch_size}"
    facts = [
        f"model        {job.model.num_parameters:,} parameters",
        f"batch        {geometry.global_batch_size} sequences = {found.tokens_per_step:,} tokens a step",
        f"             {passes} on each of {geometry.dp} data-parallel ranks",
    ]
    if geometry.pp > 1:
        facts.append(
            f"pipeline     {job.distributed.pp_schedule}, {geometry.pp_microbatches} microbatches,"
            f" bubble {100 * found.bubble_fraction:.1f} % of the time"
        )
    pinned = "pinned" if job.checkpoint.async_mode.value == "async_with_pinned_mem" else "pageable"
    most = max(place.staged_bytes for place in found.pipeline)
    facts += [
        f"checkpoint   {size(checkpoint.size_bytes)} in {checkpoint.num_files} files; weights and two"
        f" moments, fp32: {checkpoint.payload_bytes:,} bytes",
        f"staging      {size(most)} of {pinned} host memory a rank,"
        f" {size(found.staged_on_node_bytes)} a node of {found.ranks_per_node}"
        f" ({job.checkpoint.async_mode.value})",
    ]
    limit = job.checkpoint.max_host_memory_gb
    if limit is not None and found.staged_on_node_bytes > limit * 1e9:
        facts.append(f"             more than checkpoint.max_host_memory_gb {limit}: the run would not start")
    return facts


def _verdict(found: Plan, memory_gb: float | None) -> list[str]:
    need = found.device_bytes / 1e9
    if memory_gb is None:
        return [f"device       {need:.1f} GB at least; give --memory-gb to compare"]
    usable = (1 - RESERVED_SHARE) * memory_gb
    answer = "fits" if found.fits(memory_gb) else "does not fit"
    reserve = f"{100 * RESERVED_SHARE:.0f} % left for CUDA, NCCL, fragmentation"
    return [f"device       {answer}: {need:.1f} GB of {usable:.1f} GB usable ({memory_gb:g} GB; {reserve})"]


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"
