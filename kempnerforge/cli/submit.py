"""``kempnerforge submit``: check a configuration, then queue it on SLURM."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from kempnerforge import fsio
from kempnerforge.cli.config import NoFiles
from kempnerforge.config.overrides import split_positionals
from kempnerforge.config.run import PLACEHOLDER
from kempnerforge.config.schema import LoadedJob, load_job
from kempnerforge.config.sources import DEFAULT
from kempnerforge.errors import ConfigError, ConfigIssue, RunFolderError
from kempnerforge.goodput.event_log import read_events, saves_s
from kempnerforge.slurm import job as slurm_job
from kempnerforge.slurm.kill_grace import query_grace
from kempnerforge.slurm.script import (
    Request,
    check_options,
    escape_pattern,
    expand_pattern,
    option_value,
    render,
)
from kempnerforge.train.preflight import check_files_of
from kempnerforge.train.termination.deadline import p99

app = typer.Typer(add_completion=False)
SBATCH = "sbatch options"
TIMEOUT = "train.shutdown_timeout_s"
NOT_OF_THE_JOB = ("--dry-run", "--no-files")
"""Options that do not change the script."""


class _Submit(TyperCommand):
    """Passes the arguments after ``--`` to sbatch. click alone would drop the ``--``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        at = args.index("--") if "--" in args else len(args)
        ctx.meta[SBATCH] = args[at + 1 :]
        return super().parse_args(ctx, args[:at])


@app.command(cls=_Submit, context_settings={"ignore_unknown_options": True})
def submit(
    context: typer.Context,
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes.")],
    time: Annotated[
        str, typer.Option(help="Time limit of each start, in sbatch's format: 30 (minutes), 24:00:00, 2-12.")
    ],
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE [--section.key=value ...] [-- SBATCH_OPTION ...]", help="The TOML file."
        ),
    ],
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs per node. 0 trains on the CPU.")] = 1,
    processes_per_node: Annotated[
        int | None, typer.Option(min=1, help="Ranks per node.", show_default="one per GPU, else 1")
    ] = None,
    script: Annotated[Path, typer.Option(help="The training script.")] = Path("scripts/train.py"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script, submit nothing.")] = False,
    no_files: NoFiles = False,
) -> None:
    """Check FILE on this layout, then train it as a SLURM job that requeues itself until it is finished.

    Example: kempnerforge submit run.toml --nodes 4 --gpus-per-node 8 --time 24:00:00 --train.seed=1
    -- --partition=gpu. Write config overrides before the --, and sbatch options after it.
    """
    sbatch_options: list[str] = context.meta[SBATCH]
    positionals, overrides = split_positionals(arguments)
    if not positionals:
        raise typer.BadParameter("FILE is missing")
    ranks = processes_per_node or max(1, gpus_per_node)
    file, overrides = positionals[0], [*overrides, *positionals[1:]]
    loaded = load_job(file, overrides, world_size=nodes * ranks, inside_job=False)
    job, run_dir = loaded.job, loaded.job.run.dir or f"runs/{loaded.job.run.name}"
    if not no_files:
        check_files_of(loaded, where=file)
    check_options(time, sbatch_options, run_dir, is_shared=not PLACEHOLDER.search(run_dir))
    if not script.is_file():
        hint = "run this in the repository's folder, or give --script"
        raise ConfigError([ConfigIssue("--script", f"{script} does not exist", hint)], where="command line")
    timeout_s = _shutdown_timeout_s(loaded, run_dir, sbatch_options)
    if timeout_s != job.train.shutdown_timeout_s:
        overrides = [*overrides, f"--{TIMEOUT}={timeout_s:g}"]
    request = Request(
        name=job.run.name,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        processes_per_node=ranks,
        time=time,
        train=[str(script), "--config", file, *overrides],
        command=shlex.join(["kempnerforge", *(word for word in sys.argv[1:] if word not in NOT_OF_THE_JOB)]),
        output=_log(run_dir, sbatch_options),
        shutdown_timeout_s=timeout_s,
        bin_dir=str(Path(sys.executable).parent),
        sbatch_options=sbatch_options,
    )
    text = render(request)
    if dry_run:
        typer.echo(text, nl=False)
        return
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
    return saves_s(read_events(Path(run_dir).expanduser()))


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def _log(run_dir: str, sbatch_options: list[str]) -> str:
    """Return the path pattern of the job's log: in the run's folder, unless SLURM would have to create it."""
    if not PLACEHOLDER.search(run_dir):
        return escape_pattern(str(Path(run_dir).expanduser() / "slurm")) + "/%j.log"
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
    for line in (
        f"job {job_id}: {request.nodes} x {request.processes_per_node} processes, time limit {request.time}",
        f"  log           tail -F {log}",
        f"  state         squeue -j {job_id}",
        f"  checkpoints   kempnerforge ckpt ls {run_dir}",
        f"  save now      touch {run_dir}/checkpoint.request",
        f"  cancel        scancel {job_id}",
        f"  save, requeue scancel --batch --signal=USR1 {job_id}",
    ):
        typer.echo(line)
