"""``kempnerforge train``: start the ranks of a run on this node, restart them after a fault, and end them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from kempnerforge.cli.config import OVERRIDABLE, FileAndOverrides, file_and_overrides
from kempnerforge.config.schema import JobConfig, load_job
from kempnerforge.errors import ConfigError, ConfigIssue
from kempnerforge.launch import node_resources
from kempnerforge.launch.event_loop import EventLoop
from kempnerforge.launch.node_link import Meeting, accept_nodes, join_head
from kempnerforge.launch.rank_processes import NodeLayout, RankProcesses
from kempnerforge.launch.supervisor import Follower, Head, Node, RunLimits, say
from kempnerforge.printable import printable
from kempnerforge.python_process import python_options
from kempnerforge.slurm.step import LINK_SECRET, JobStep, this_step

REQUEUE = "KEMPNERFORGE_REQUEUE"
"""Set in jobs that ``submit`` makes: SLURM may start the run again, without a node that recorded faults."""
ONLY_HERE = "127.0.0.1"

app = typer.Typer()


@app.command(context_settings=OVERRIDABLE)
def train(
    arguments: FileAndOverrides,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Processes on each node.", show_default="one per GPU of this node, else 1"),
    ] = None,
    script: Annotated[
        Path | None,
        typer.Option(
            help="A training script that takes the arguments of scripts/train.py.", show_default="none"
        ),
    ] = None,
) -> None:
    """Train FILE, or resume its run, on the GPUs of this node. Restart all processes after a fault.

    Ctrl-C commits the current step and stops. Run the same command to resume. In a SLURM job on
    several nodes, start it once per node: srun --ntasks-per-node 1 kempnerforge train FILE.
    To see the keys of FILE: kempnerforge config keys.

    Exit status: 0 finished, 2 invalid configuration, 75 stopped before the last step, 76 no progress
    over several attempts; any other is a fault.
    """
    file, overrides = file_and_overrides(arguments)
    step = this_step(os.environ)
    layout = _layout(step, processes or max(1, node_resources.count_gpus()))
    try:
        if script is not None and not script.is_file():
            raise ConfigError([ConfigIssue("--script", f"{script} does not exist")], where="command line")
        job = load_job(file, overrides, world_size=layout.world_size).job
    except ConfigError as error:
        if not layout.node_rank:
            raise
        # Perhaps only this node cannot read the file.
        print(printable(f"node {layout.node_rank}: {error}", lines=True), file=sys.stderr)
        raise typer.Exit(error.exit_status) from None
    program = [str(script)] if script is not None else [*python_options(), "-m", "kempnerforge.cli.train"]
    raise typer.Exit(_supervise([*program, "--config", file, *overrides], job, layout, step))


def _layout(step: JobStep | None, processes: int) -> NodeLayout:
    if step is None:
        return NodeLayout(1, 0, processes)
    if step.num_tasks != step.num_nodes:
        problem = f"srun started {step.num_tasks} tasks on {step.num_nodes} nodes"
        allowed = "start one per node, which starts the ranks: srun --ntasks-per-node 1"
        raise ConfigError([ConfigIssue("kempnerforge train", problem, allowed)], where="job step")
    return NodeLayout(step.num_nodes, step.task, processes)


def _supervise(program: list[str], job: JobConfig, layout: NodeLayout, step: JobStep | None) -> int:
    environ = dict(os.environ)
    environ.pop(LINK_SECRET, None)  # the ranks do not need it
    message = node_resources.set_threads(environ, layout.ranks_per_node)
    if message and not layout.node_rank:
        say(message)
    links, link, address = {}, None, ONLY_HERE
    if step is not None:
        address = step.first_address()
        meeting = Meeting(address, step.ports, step.key)
        if layout.node_rank:
            link = join_head(meeting, layout.node_rank, layout.ranks_per_node)
        else:
            links = accept_nodes(meeting, layout.num_nodes, layout.ranks_per_node)
    loop = EventLoop()
    node = Node(
        RankProcesses(program, layout, loop.selector, environ),
        shutdown_timeout_s=job.train.shutdown_timeout_s,
    )
    if link is not None:
        return Follower(node, link).run(loop)
    limits = RunLimits(
        run_dir=job.run.folder,
        max_restarts=job.train.max_restarts,
        max_faults_without_progress=job.run.max_faults_without_progress,
        may_requeue=REQUEUE in os.environ,
    )
    return Head(node, links, limits, address).run(loop)
