"""The job step (``srun``) that this process is a task of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kempnerforge.process_identity import restart_count
from kempnerforge.slurm import job as slurm_job
from kempnerforge.slurm.job import SlurmError

_FIRST_PORT, _NUM_PORTS = 20000, 12000
"""Below the range of outgoing connections."""
_TRIES = 16

LINK_SECRET = "KEMPNERFORGE_LINK_SECRET"
"""A random text that a job script makes for its steps. Other users cannot read it."""


@dataclass(frozen=True)
class JobStep:
    """A job step with one task on each of several nodes."""

    num_tasks: int
    num_nodes: int
    task: int
    """The number of this task, which is also the number of its node."""
    first_node: str
    job_id: str
    step_id: str
    restart_count: int
    secret: str = field(default="", repr=False)
    """Value of ``LINK_SECRET``; empty in steps of a user's own script without it."""

    @property
    def key(self) -> bytes:
        """The key of the launchers' messages. It differs between all steps of all starts of all jobs."""
        return f"{self.job_id}.{self.restart_count}.{self.step_id}.{self.secret}".encode()

    @property
    def ports(self) -> Sequence[int]:
        """Ports on which the first task may listen, so that the others need not be told which is free."""
        seed = int(self.job_id) * 7 + self.restart_count * 31 + int(self.step_id or 0) * 101
        return [_FIRST_PORT + (seed + attempt * 743) % _NUM_PORTS for attempt in range(_TRIES)]

    def first_address(self) -> str:
        """Return the address by which SLURM reaches the first node; its name if SLURM does not answer."""
        try:
            facts = slurm_job.parse_facts(slurm_job.query("scontrol", "-o", "show", "node", self.first_node))
        except SlurmError:
            return self.first_node
        return facts.get("NodeAddr", self.first_node)


def this_step(environ: Mapping[str, str]) -> JobStep | None:
    """Return the step that this process is a task of; None for a single task, and outside of ``srun``.

    The shell of an sbatch script has SLURM_PROCID but no step.
    """
    try:
        num_tasks = int(environ.get("SLURM_STEP_NUM_TASKS", "1"))
        if num_tasks == 1 or "SLURM_PROCID" not in environ:
            return None
        return JobStep(
            num_tasks=num_tasks,
            num_nodes=int(environ.get("SLURM_STEP_NUM_NODES", "1")),
            task=int(environ["SLURM_PROCID"]),
            first_node=slurm_job.expand_hosts(environ.get("SLURM_STEP_NODELIST", ""))[0],
            job_id=str(int(environ["SLURM_JOB_ID"])),
            step_id=str(int(environ.get("SLURM_STEP_ID", "0"))),
            restart_count=restart_count(environ),
            secret=environ.get(LINK_SECRET, ""),
        )
    except (KeyError, ValueError, IndexError) as error:
        raise SlurmError(f"the variables of this job step cannot be read: {error!r}") from None
