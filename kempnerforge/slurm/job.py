"""Query SLURM about a job, and submit, requeue and update jobs."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from kempnerforge import hostlist
from kempnerforge.errors import KempnerForgeError
from kempnerforge.process_identity import restart_count

_QUERY_TIMEOUT_S = 60.0
"""A busy controller answers late. SLURM's own clients retry within this time."""
_USABLE = r"(idle|mixed|allocated|completing|reserved|planned)[-+#~%@^!]?"
"""States of nodes on which jobs can start, now or later. A trailing ``*`` marks an unresponsive node."""
_NO_VALUE = ("(null)", "None", "N/A", "Unknown")


class SlurmError(KempnerForgeError):
    """A SLURM command is missing, failed, or timed out."""


_OF_A_JOB = re.compile(
    "SLURM_(?!CONF$).*|SLURMD_.*|SRUN_.*|PMI.*|TORCHELASTIC_.*|(GROUP_|LOCAL_|ROLE_)?(RANK|WORLD_SIZE)"
    "|ROLE_NAME|GROUP_WORLD_SIZE|MASTER_(ADDR|PORT)|KEMPNERFORGE_(LAUNCHER_PID|RESTART_COUNT|STORE_FD|REQUEUE)"
)
"""Environment variables that belong to a job, a job step, or a rank."""


@dataclass(frozen=True)
class SlurmJob:
    """The job that this process runs in."""

    job_id: str
    """Id of the array task, not of the array."""
    restart_count: int
    """Number of restarts by SLURM; 0 at the first start."""
    node_names: tuple[str, ...]
    array_job_id: str = ""
    array_task_id: str = ""

    @property
    def handle(self) -> str:
        """Job id for SLURM commands. The plain id of an array task can mean the whole array."""
        return f"{self.array_job_id}_{self.array_task_id}" if self.array_task_id else self.job_id

    @property
    def attempt_name(self) -> str:
        """A name that is unique among all starts of all jobs, such as ``1234.0``."""
        return f"{self.job_id}.{self.restart_count}"


def this_job(environ: Mapping[str, str]) -> SlurmJob | None:
    """Return the job of a process with this environment; None outside of SLURM."""
    job_id = environ.get("SLURM_JOB_ID", "")
    if not job_id:
        return None
    return SlurmJob(
        job_id=job_id,
        restart_count=restart_count(environ),
        node_names=tuple(expand_hosts(environ.get("SLURM_JOB_NODELIST", ""))),
        array_job_id=environ.get("SLURM_ARRAY_JOB_ID", ""),
        array_task_id=environ.get("SLURM_ARRAY_TASK_ID", ""),
    )


def expand_hosts(nodelist: str) -> list[str]:
    """Return the nodes of SLURM's compact list. Raises SlurmError."""
    try:
        return hostlist.expand(nodelist)
    except ValueError as error:
        raise SlurmError(str(error)) from None


def node_name(environ: Mapping[str, str]) -> str:
    """Return this node's name in SLURM, which can differ from its host name; the host name outside SLURM."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def state(handle: str) -> str:
    """Return RUNNING, PENDING, COMPLETING, ...; empty if SLURM no longer lists the job."""
    return query("squeue", "--noheader", f"--jobs={handle}", "--format=%T").strip()


def facts(handle: str) -> dict[str, str]:
    """Return the output of ``scontrol show job``, such as ``ExcNodeList`` and ``PreemptTime``."""
    return parse_facts(query("scontrol", "-o", "show", "job", handle))


def parse_facts(line: str) -> dict[str, str]:
    """Return the ``Key=value`` words of a line of ``scontrol -o show`` that have a value."""
    pairs = (word.partition("=") for word in line.split())
    return {key: value for key, mark, value in pairs if mark and value not in _NO_VALUE}


def lost_nodes(node_names: Sequence[str]) -> list[str]:
    """Return the nodes that SLURM considers lost."""
    if not node_names:
        return []
    listing = query("sinfo", "--noheader", "--Node", f"--nodes={','.join(node_names)}", "--format=%N %T")
    return parse_lost_nodes(listing)


def parse_lost_nodes(listing: str) -> list[str]:
    """Return nodes that are down, failed or not responding (``*``) in lines of ``sinfo --format="%N %T"``."""
    lost = []
    for line in listing.splitlines():
        name, _, node_state = line.strip().partition(" ")
        if re.match(r"(down|fail|failing|error|unknown)\b", node_state) or node_state.endswith("*"):
            lost.append(name)
    return sorted(set(lost))


def exclude(handle: str, node_names: Sequence[str]) -> None:
    """Exclude nodes from the next starts of a queued job, in addition to those it already excludes.

    Raises SlurmError, also if the job could then never start.
    """
    job = facts(handle)
    excluded = {*expand_hosts(job.get("ExcNodeList", "")), *node_names}
    listing = query("sinfo", "--noheader", "--Node", f"--partition={job['Partition']}", "--format=%N %T")
    needed = int(job["NumNodes"].partition("-")[0])
    if not leaves_enough(listing, excluded, required=expand_hosts(job.get("ReqNodeList", "")), needed=needed):
        raise SlurmError(f"the job needs {needed} nodes, and too few usable nodes would be left")
    query("scontrol", "update", f"JobId={handle}", f"ExcNodeList={','.join(sorted(excluded))}")


def leaves_enough(listing: str, excluded: Collection[str], *, required: Collection[str], needed: int) -> bool:
    """Return whether a job can start without the nodes ``excluded``.

    Args:
        listing: the nodes of its partition, from ``sinfo --format="%N %T"``.
        excluded: nodes to exclude.
        required: nodes that the job must have (``--nodelist``).
        needed: number of nodes that the job needs.
    """
    lines = [line.split() for line in listing.splitlines()]
    usable = {name for name, node_state, *_ in lines if re.fullmatch(_USABLE, node_state)}
    return not set(required) & set(excluded) and len(usable - set(excluded)) >= needed


def requeue(handle: str) -> None:
    """Requeue the job. SLURM also ends the calling script, by SIGTERM."""
    query("scontrol", "requeue", handle)


def submit(script: str) -> str:
    """Submit a script with ``sbatch`` and return the job's id."""
    # The output is "7;cluster" if SLURM manages several clusters.
    environ = clean_environment(os.environ)
    return query("sbatch", "--parsable", text=script, environ=environ).strip().partition(";")[0]


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return ``environ`` without variables of the current job or launcher, which sbatch would pass on.

    Keep ``SLURM_CONF`` and a user's defaults (``SBATCH_*``).
    """
    return {name: value for name, value in environ.items() if not _OF_A_JOB.fullmatch(name)}


def query(*command: str, text: str = "", environ: Mapping[str, str] = os.environ) -> str:
    """Run a SLURM command and return its output, with times in SLURM's standard format.

    Raises:
        SlurmError: the command is not installed, times out, or fails.
    """
    if shutil.which(command[0], path=environ.get("PATH")) is None:
        raise SlurmError(f"{command[0]} is not installed here; run this on a machine with SLURM's commands")
    try:
        done = subprocess.run(
            command,
            env={**environ, "SLURM_TIME_FORMAT": "standard"},
            input=text,
            capture_output=True,
            text=True,
            timeout=_QUERY_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{' '.join(command)}: no answer in {_QUERY_TIMEOUT_S:g} s; try again") from None
    if done.returncode != 0:
        raise SlurmError(f"{' '.join(command)}: {done.stderr.strip() or f'status {done.returncode}'}")
    return done.stdout
