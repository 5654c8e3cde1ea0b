"""What SLURM says of a job, and the few things that are asked of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kempnerforge.errors import KempnerForgeError
from kempnerforge.slurm import nodes

_ASK_TIMEOUT_S = 60.0
"""A busy controller answers late; SLURM's own clients retry within this time."""


class SlurmError(KempnerForgeError):
    """A command of SLURM is missing, failed, or did not answer."""


@dataclass(frozen=True)
class SlurmJob:
    """The job that this process runs in."""

    job_id: str
    """Of one task of an array, not of the array."""
    restart_count: int
    """How often SLURM has started it again; 0 in its first run."""
    node_names: tuple[str, ...]
    array_job_id: str = ""
    array_task_id: str = ""

    @property
    def attempt_name(self) -> str:
        """A name that no other start of any job has, such as ``1234.0``."""
        return f"{self.job_id}.{self.restart_count}"


def this_job(environ: Mapping[str, str]) -> SlurmJob | None:
    """The job of a process with this environment; None outside of SLURM."""
    job_id = environ.get("SLURM_JOB_ID", "")
    if not job_id:
        return None
    return SlurmJob(
        job_id=job_id,
        restart_count=restart_count(environ),
        node_names=tuple(nodes.expand(environ.get("SLURM_JOB_NODELIST", ""))),
        array_job_id=environ.get("SLURM_ARRAY_JOB_ID", ""),
        array_task_id=environ.get("SLURM_ARRAY_TASK_ID", ""),
    )


def restart_count(environ: Mapping[str, str]) -> int:
    """How often SLURM has started this job again. SLURM leaves it unset in a job's first run."""
    restarts = environ.get("SLURM_RESTART_COUNT", "")
    return int(restarts) if restarts.isdecimal() else 0


def state(job_id: str) -> str:
    """RUNNING, PENDING, COMPLETING, ...; empty when SLURM no longer lists the job."""
    return ask("squeue", "--noheader", f"--jobs={job_id}", "--format=%T").strip()


def is_preempted(job_id: str) -> bool:
    """Whether the job lives only for what is left of its GraceTime."""
    return parse_preempted(ask("scontrol", "-o", "show", "job", job_id))


def parse_preempted(job_line: str) -> bool:
    """The same, from the line of ``scontrol -o show job``; SLURM prints the time only where there is one."""
    found = re.search(r"\bPreemptTime=(\S+)", job_line)
    return found is not None and found[1] not in ("None", "N/A", "Unknown")


def lost_nodes(node_names: Sequence[str]) -> list[str]:
    """Those of the nodes that SLURM takes for lost."""
    if not node_names:
        return []
    listing = ask("sinfo", "--noheader", "--Node", f"--nodes={','.join(node_names)}", "--format=%N %T")
    return parse_lost_nodes(listing)


def parse_lost_nodes(listing: str) -> list[str]:
    """Nodes that are down, failed or do not answer (``*``), from lines of ``sinfo --format="%N %T"``."""
    lost = []
    for line in listing.splitlines():
        name, _, word = line.strip().partition(" ")
        if re.match(r"(down|fail|failing|error|unknown)\b", word) or word.endswith("*"):
            lost.append(name)
    return sorted(set(lost))


def exclude(job_id: str, node_names: Sequence[str]) -> None:
    """Keep the job's next starts off these nodes, beside those that it leaves out already."""
    known = re.search(r"\bExcNodeList=(\S+)", ask("scontrol", "-o", "show", "job", job_id))
    before = nodes.expand(known[1]) if known and known[1] != "(null)" else []
    names = ",".join(sorted({*before, *node_names}))
    ask("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={names}")


def requeue(job_id: str) -> None:
    """Put the job back into the queue. SLURM ends the calling script too, by SIGTERM."""
    ask("scontrol", "requeue", job_id)


def submit(script: str) -> str:
    """Hand a script to ``sbatch``; returns the job's id."""
    # "7;cluster" where several clusters are known
    return ask("sbatch", "--parsable", text=script).strip().partition(";")[0]


def ask(*command: str, text: str = "") -> str:
    """What a command of SLURM prints.

    Raises:
        SlurmError: it is not installed, does not answer, or fails.
    """
    if shutil.which(command[0]) is None:
        raise SlurmError(f"{command[0]} is not installed here; run this where SLURM's commands are")
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=_ASK_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{' '.join(command)}: no answer in {_ASK_TIMEOUT_S:g} s; try again") from None
    if done.returncode != 0:
        raise SlurmError(f"{' '.join(command)}: {done.stderr.strip() or f'status {done.returncode}'}")
    return done.stdout
