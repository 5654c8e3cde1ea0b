"""``kempnerforge slurm``: commands that batch scripts run before and after training."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Collection, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Annotated

import typer

from kempnerforge import fsio
from kempnerforge.checkpoint.run import metadata
from kempnerforge.cli.config import file_and_overrides
from kempnerforge.cli.train import split_config
from kempnerforge.config.schema import load_job
from kempnerforge.errors import EXIT_FAULT, RunFolderError
from kempnerforge.goodput.faults import read_faults
from kempnerforge.goodput.history import AttemptHistory, read_history
from kempnerforge.slurm import job as slurm_job
from kempnerforge.slurm.attempt_info import describe_attempt, git_revision
from kempnerforge.slurm.job import SlurmError, SlurmJob
from kempnerforge.slurm.requeue_policy import Decision, decide
from kempnerforge.slurm.sweep import read_sweep
from kempnerforge.train.termination import stop_request

app = typer.Typer(help="Commands that batch scripts run before and after training.", no_args_is_help=True)
NOTES = "slurm"


@app.command()
def begin(
    arguments: Annotated[list[str], typer.Argument(metavar="-- FILE [--section.key=value ...]")],
    processes_per_node: Annotated[int, typer.Option(min=1, help="Ranks on each node.")],
) -> None:
    """Check the configuration on this job's nodes, record the attempt, and print the run's folder."""
    job = _this_job()
    is_of_train_py = any(word.partition("=")[0] == "--config" for word in arguments)
    file, overrides = split_config(arguments) if is_of_train_py else file_and_overrides(arguments)
    loaded = load_job(file, overrides, world_size=processes_per_node * len(job.node_names))
    folder = loaded.job.run.folder.absolute()
    text = describe_attempt(
        os.environ,
        command=["kempnerforge train", *arguments],
        config_toml=loaded.job.to_toml(),
        revision=git_revision(Path.cwd()),
    )
    try:
        fsio.make_folder(folder / NOTES)
        fsio.atomic_write(folder / NOTES / f"{job.attempt_name}.txt", text.encode(), private=True)
        fsio.atomic_write(folder / NOTES / f"{job.attempt_name}.began", str(_attempt(folder)).encode())
    except OSError as error:
        raise RunFolderError(f"run.dir: {folder} cannot be used: {error}") from error
    typer.echo(folder)


@app.command()
def cell(sweep_dir: Annotated[Path, typer.Argument(metavar="SWEEP_DIR")]) -> None:
    """Print the overrides of this array task of a sweep, one per line."""
    sweep = read_sweep(sweep_dir)
    task = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    found = [one for one in sweep.cells if str(one.task) == task]
    if not found:
        raise RunFolderError(f"{sweep_dir} has no task '{task}' (SLURM_ARRAY_TASK_ID)")
    for argument in found[0].arguments:
        print(argument)


@app.command()
def after(run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR")]) -> None:
    """Requeue this job if its run is not finished. Exits with the status that the job should have."""
    job = _this_job()
    decision = decide_for(job, run_dir)
    print(f"requeue: {'yes' if decision.requeue else 'no'}: {decision.why}", flush=True)
    if decision.requeue:
        # Requeueing sends SIGTERM to this script, and nodes can be excluded only once the job is in
        # the queue again. SLURM does not start the job before this script has ended.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        slurm_job.requeue(job.handle)
        if decision.exclude:
            _try_to_exclude(job, decision)
    raise typer.Exit(decision.status)


def decide_for(job: SlurmJob, run_dir: Path) -> Decision:
    """Decide whether to requeue a job whose training has just ended."""
    began = run_dir / NOTES / f"{job.attempt_name}.began"
    before = int(fsio.read_file(began)) if began.exists() else 0
    history = read_history(run_dir)
    # The last attempt of this start of the job. The launcher has restarted the ranks after earlier ones.
    last = history[-1] if history and history[-1].number > before else None
    end = last.end if last is not None else None
    number = last.number if last is not None else None
    hosts = {fault.host for fault in read_faults(run_dir) if fault.attempt == number and not fault.by_peer}
    facts = slurm_job.facts(job.handle)
    return decide(
        job_state=slurm_job.state(job.handle),
        status=end["status"] if end is not None else None,
        reason=str(end["reason"]) if end is not None else "",
        stop_requested_by=_stop_requested_by(facts, run_dir),
        lost_nodes=slurm_job.lost_nodes(job.node_names),
        faulty_nodes=nodes_of(hosts, job.node_names),
        lost_in_a_row=lost_in_a_row(history, before=before),
        may_requeue=facts.get("Requeue") != "0",
    )


def lost_in_a_row(history: Sequence[AttemptHistory], *, before: int) -> int | None:
    """Count the newest attempts in a row that were lost without a commit; None unless the last one was lost.

    ``before`` is the number of the last attempt that started before this job.
    """
    if not history or history[-1].number <= before or history[-1].kind != "lost":
        return None
    row = takewhile(lambda attempt: attempt.kind == "lost" and not attempt.commits, reversed(history))
    return sum(1 for _ in row)


def nodes_of(hosts: Collection[str], node_names: Sequence[str]) -> list[str]:
    """Return the job's nodes with one of the host names. Either may include a domain."""
    short = {host.partition(".")[0] for host in hosts}
    return [name for name in node_names if name.partition(".")[0] in short]


def _stop_requested_by(facts: Mapping[str, str], run_dir: Path) -> str:
    """Return what requested the stop.

    The traps of the batch shell write the name of the signal into the stop file. At the start of
    the GraceTime of a preemption the shell gets no signal, but SLURM reports a ``PreemptTime``.
    """
    path = run_dir / stop_request.NAME
    content = fsio.read_mark(path).decode(errors="replace").strip() if path.exists() else ""
    if content.startswith("SIG"):
        return content
    return "preempted" if "PreemptTime" in facts else ""


def _try_to_exclude(job: SlurmJob, decision: Decision) -> None:
    try:
        slurm_job.exclude(job.handle, decision.exclude)
    except SlurmError as error:  # the requeue is more important
        print(f"cannot exclude {', '.join(decision.exclude)}: {error}", file=sys.stderr)


def _attempt(folder: Path) -> int:
    record = metadata.read(folder)
    return record.attempt if record is not None else 0


def _this_job() -> SlurmJob:
    job = slurm_job.this_job(os.environ)
    if job is None:
        print(
            "SLURM_JOB_ID is not set: run this in the script of a SLURM job. See: kempnerforge submit --help",
            file=sys.stderr,
        )
        raise typer.Exit(EXIT_FAULT)
    return job
