"""``kempnerforge submit``: check a configuration, then queue it on SLURM."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from kempnerforge import fsio
from kempnerforge.cli.config import NoFiles, NoPlugins, file_and_overrides
from kempnerforge.cli.plugin_check import check_plugins
from kempnerforge.config.path_text import expand
from kempnerforge.config.run import PLACEHOLDER
from kempnerforge.config.schema import LoadedJob, load_job
from kempnerforge.config.sources import DEFAULT
from kempnerforge.errors import ConfigError, ConfigIssue, RunFolderError
from kempnerforge.goodput.event_log import read_events, saves_s
from kempnerforge.slurm import job as slurm_job
from kempnerforge.slurm.kill_grace import query_grace
from kempnerforge.slurm.resources import Resources
from kempnerforge.slurm.script import (
    Request,
    check_options,
    escape_pattern,
    expand_pattern,
    option_value,
    render,
)
from kempnerforge.slurm.sweep import Sweep, make_sweep, write_sweep
from kempnerforge.train.preflight import check_files_of
from kempnerforge.train.termination.deadline import p99

app = typer.Typer(add_completion=False)
SBATCH = "sbatch options"
TIMEOUT = "train.shutdown_timeout_s"
NOT_OF_THE_JOB = ("--dry-run", "--no-files", "--no-plugins")
"""Options that do not change the script."""


class _Submit(TyperCommand):
    """Passes the arguments after ``--`` to sbatch. click alone would drop the ``--``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        at = args.index("--") if "--" in args else len(args)
        ctx.meta[SBATCH] = args[at + 1 :]
        return super().parse_args(ctx, args[:at])


Nodes = Annotated[int, typer.Option(min=1, help="Number of nodes.")]
TimeLimit = Annotated[
    str, typer.Option(help="Time limit of each start, in sbatch's format: 30 (minutes), 24:00:00, 2-12.")
]
Arguments = Annotated[
    list[str],
    typer.Argument(metavar="FILE [--section.key=value ...] [-- SBATCH_OPTION ...]", help="The TOML file."),
]
GpusPerNode = Annotated[
    int | None,
    typer.Option(min=0, help="GPUs per node. 0 trains on the CPU.", show_default="those of --gres, else 1"),
]
ProcessesPerNode = Annotated[
    int | None, typer.Option(min=1, help="Ranks per node.", show_default="one per GPU, else 1")
]
CpusPerTask = Annotated[
    int | None, typer.Option(min=1, help="CPU cores for all processes of a node together.")
]
Memory = Annotated[str, typer.Option(help="Memory of each node, such as 200G. 0 requests all of it.")]
Gres = Annotated[
    str, typer.Option(help="Generic resources of each node, such as gpu:h100:8, instead of --gpus-per-node.")
]
Prologue = Annotated[
    list[str],
    typer.Option(
        metavar="COMMAND",
        help="Shell command at the start of the job script, such as 'module load cuda'. May be repeated.",
    ),
]
SweepOptions = Annotated[
    list[str],
    typer.Option(
        "--sweep",
        metavar="KEY=[VALUE,...]",
        help="Train one run per value, as a job array. If repeated, one run per combination of values.",
    ),
]
Script = Annotated[Path | None, typer.Option(help="A training script of your own.", show_default="none")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the script, submit nothing.")]


@app.command(cls=_Submit, context_settings={"ignore_unknown_options": True})
def submit(
    context: typer.Context,
    nodes: Nodes,
    time: TimeLimit,
    arguments: Arguments,
    gpus_per_node: GpusPerNode = None,
    processes_per_node: ProcessesPerNode = None,
    cpus_per_task: CpusPerTask = None,
    mem: Memory = "",
    gres: Gres = "",
    prologue: Prologue = [],  # noqa: B006 - typer copies it
    sweep: SweepOptions = [],  # noqa: B006
    script: Script = None,
    dry_run: DryRun = False,
    no_files: NoFiles = False,
    no_plugins: NoPlugins = False,
) -> None:
    """Check FILE on this layout, then train it as a SLURM job that requeues itself until it is finished.

    Example: kempnerforge submit run.toml --nodes 4 --gpus-per-node 8 --time 24:00:00 --train.seed=1
    -- --partition=gpu. Write config overrides before the --, and sbatch options after it.
    """
    sbatch_options: list[str] = context.meta[SBATCH]
    file, overrides = file_and_overrides(arguments)
    resources = Resources(gpus_per_node=gpus_per_node, gres=gres, cpus_per_task=cpus_per_task, mem=mem)
    resources.check(sbatch_options)
    ranks = processes_per_node or max(1, resources.gpus)
    if script is not None and not script.is_file():
        raise ConfigError([ConfigIssue("--script", f"{script} does not exist")], where="command line")
    load = partial(_load, world_size=nodes * ranks, no_files=no_files, no_plugins=no_plugins)
    loaded = load(file, overrides)
    run_dir = loaded.job.run.dir or f"runs/{loaded.job.run.name}"
    run_dir = str(expand(run_dir, key="run.dir")) if sweep else run_dir
    cells = _make_sweep(sweep, file, overrides, run_dir, loaded.job.run.name) if sweep else None
    for cell in cells.cells if cells is not None else []:
        where = f"task {cell.task} of the sweep ({cell.description})"
        load(file, [*overrides, *cell.arguments], where=where)
    is_shared = cells is None and not PLACEHOLDER.search(run_dir)
    check_options(time, sbatch_options, run_dir, is_shared=is_shared, is_sweep=cells is not None)
    timeout_s = _shutdown_timeout_s(loaded, run_dir, sbatch_options)
    if timeout_s != loaded.job.train.shutdown_timeout_s:
        overrides = [*overrides, f"--{TIMEOUT}={timeout_s:g}"]
    _warn_without_cpus(resources, ranks, sbatch_options)
    request = Request(
        name=loaded.job.run.name,
        nodes=nodes,
        processes_per_node=ranks,
        time=time,
        train=[file, *overrides],
        command=shlex.join(["kempnerforge", *(word for word in sys.argv[1:] if word not in NOT_OF_THE_JOB)]),
        output=_log(run_dir, sbatch_options, is_sweep=cells is not None),
        resources=resources.options,
        prologue=prologue,
        script=str(script or ""),
        sweep=run_dir if cells is not None else "",
        num_cells=len(cells.cells) if cells is not None else 0,
        bin_dir=str(Path(sys.executable).parent),
        sbatch_options=sbatch_options,
    )
    _queue(request, run_dir, cells, dry_run=dry_run)


def _load(
    file: str, overrides: list[str], *, world_size: int, no_files: bool, no_plugins: bool, where: str = ""
) -> LoadedJob:
    """Load and check a config. ``where`` is added to errors."""
    try:
        loaded = load_job(file, overrides, world_size=world_size, inside_job=False)
        if not no_plugins:
            check_plugins(loaded, where=file)
        if not no_files:
            check_files_of(loaded, where=file)
    except ConfigError as error:
        if where:
            raise ConfigError(error.faults, where=where) from None
        raise
    return loaded


def _make_sweep(options: list[str], file: str, overrides: list[str], run_dir: str, run_name: str) -> Sweep:
    if PLACEHOLDER.search(run_dir):
        problem = "has a placeholder, and a sweep makes a folder of its own for each run in it"
        raise ConfigError([ConfigIssue("run.dir", problem, "leave the placeholder out")], where=file)
    return make_sweep(options, file=file, overrides=overrides, folder=run_dir, run_name=run_name)


def _warn_without_cpus(resources: Resources, ranks: int, sbatch_options: list[str]) -> None:
    if ranks > 1 and not resources.has_cpus(sbatch_options):
        _warn(
            f"no --cpus-per-task is given: many clusters then give the {ranks} processes of a node one core. "
            "Request a few cores per process"
        )


def _queue(request: Request, run_dir: str, sweep: Sweep | None, *, dry_run: bool) -> None:
    text = render(request)
    if dry_run:
        typer.echo(text, nl=False)
        return
    if sweep is not None:
        write_sweep(expand(run_dir, key="run.dir"), sweep)
    _make_folder(Path(expand_pattern(request.output, {})).parent)
    _follow(slurm_job.submit(text), run_dir, request)


def _shutdown_timeout_s(loaded: LoadedJob, run_dir: str, sbatch_options: list[str]) -> float:
    """Return ``train.shutdown_timeout_s``: the user's value, else what the partition allows.

    Warn if a preemption could lose steps.
    """
    own = loaded.job.train.shutdown_timeout_s
    grace = query_grace(sbatch_options)
    if grace is None:
        return own
    is_own = loaded.sources[TIMEOUT] != DEFAULT
    timeout_s = own if is_own else float(grace.shutdown_timeout_s)
    granted = f"this partition allows {grace.longest_s} s between SIGTERM and SIGKILL"
    if timeout_s >= grace.longest_s:
        _warn(f"{granted}, and {TIMEOUT} is {own:g} s: a hung shutdown would be killed without a report")
    longest_s = p99(_earlier_saves_s(run_dir))
    if longest_s > min(timeout_s, grace.longest_s):
        _warn(
            f"{granted}, {TIMEOUT} is {timeout_s:g} s, and saves of this run took up to {longest_s:.0f} s: "
            "a preemption may lose the steps since the last save (checkpoint.interval_minutes bounds them)"
        )
    return timeout_s


def _earlier_saves_s(run_dir: str) -> list[float]:
    return saves_s(read_events(expand(run_dir, key="run.dir")))


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def _log(run_dir: str, sbatch_options: list[str], *, is_sweep: bool) -> str:
    """Return the path pattern of the job's log: in the run's folder, unless SLURM would have to create it."""
    if is_sweep:
        return escape_pattern(str(expand(run_dir, key="run.dir") / "slurm")) + "/%A_%a.log"
    if not PLACEHOLDER.search(run_dir):
        return escape_pattern(str(expand(run_dir, key="run.dir") / "slurm")) + "/%j.log"
    is_array = option_value(sbatch_options, "--array", "-a") is not None
    return "slurm-%x-%A_%a.log" if is_array else "slurm-%x-%j.log"


def _make_folder(folder: Path) -> None:
    try:
        fsio.make_folder(folder)
    except OSError as error:
        raise RunFolderError(f"run.dir: {folder} cannot be created: {error}") from error


def _follow(job_id: str, run_dir: str, request: Request) -> None:
    log = expand_pattern(request.output, {"x": request.name, "j": job_id, "A": job_id, "a": "*"})
    if "%A" not in request.output:
        run_dir = run_dir.replace("{job_id}", job_id)
    runs = f"{request.num_cells} runs, each " if request.sweep else ""
    size = f"{request.nodes} x {request.processes_per_node} processes"
    lines = [
        f"job {job_id}: {runs}{size}, time limit {request.time}",
        f"  log           tail -F {log}",
        f"  state         squeue -j {job_id}",
    ]
    if request.sweep:
        lines += [f"  table         kempnerforge report {run_dir}"]
    else:
        lines += [
            f"  checkpoints   kempnerforge ckpt ls {run_dir}",
            f"  save now      touch {run_dir}/checkpoint.request",
        ]
    lines += [
        f"  cancel        scancel {job_id}",
        f"  save, requeue scancel --batch --signal=USR1 {job_id}",
    ]
    for line in lines:
        typer.echo(line)
