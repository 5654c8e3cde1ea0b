"""What SLURM says of a job, and the few things that are asked of it."""

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

_ASK_TIMEOUT_S = 60.0
"""A busy controller answers late; SLURM's own clients retry within this time."""
_USABLE = r"(idle|mixed|allocated|completing|reserved|planned)[-+#~%@^!]?"
"""States of nodes that jobs can be started on, now or later. A ``*`` behind it would say that it is lost."""
_NO_VALUE = ("(null)", "None", "N/A", "Unknown")


class SlurmError(KempnerForgeError):
    """A command of SLURM is missing, failed, or did not answer."""


_OF_A_JOB = re.compile(
    "SLURM_(?!CONF$).*|SLURMD_.*|SRUN_.*|PMI.*|TORCHELASTIC_.*|(GROUP_|LOCAL_|ROLE_)?(RANK|WORLD_SIZE)"
    "|ROLE_NAME|GROUP_WORLD_SIZE|MASTER_(ADDR|PORT)"
)
"""Variables of a job, of a step of it, or of a rank."""


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
    def handle(self) -> str:
        """For SLURM's commands. The plain id of one task of an array means all of them."""
        return f"{self.array_job_id}_{self.array_task_id}" if self.array_task_id else self.job_id

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
        node_names=tuple(_hosts(environ.get("SLURM_JOB_NODELIST", ""))),
        array_job_id=environ.get("SLURM_ARRAY_JOB_ID", ""),
        array_task_id=environ.get("SLURM_ARRAY_TASK_ID", ""),
    )


def _hosts(nodelist: str) -> list[str]:
    try:
        return hostlist.expand(nodelist)
    except ValueError as error:
        raise SlurmError(str(error)) from None


def node_name(environ: Mapping[str, str]) -> str:
    """This node as SLURM calls it, which need not be by its host name; outside of SLURM by that."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def state(handle: str) -> str:
    """RUNNING, PENDING, COMPLETING, ...; empty when SLURM no longer lists the job."""
    return ask("squeue", "--noheader", f"--jobs={handle}", "--format=%T").strip()


def facts(handle: str) -> dict[str, str]:
    """What ``scontrol`` says of a job, such as ``ExcNodeList`` and ``PreemptTime``."""
    return parse_facts(ask("scontrol", "-o", "show", "job", handle))


def parse_facts(line: str) -> dict[str, str]:
    """The ``Key=value`` words of a line of ``scontrol -o show``, but for those without a value."""
    pairs = (word.partition("=") for word in line.split())
    return {key: value for key, mark, value in pairs if mark and value not in _NO_VALUE}


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


def exclude(handle: str, node_names: Sequence[str]) -> None:
    """Keep the next starts of a job in the queue off these nodes, beside those that it leaves out already.

    Raises SlurmError, also when it could never start then.
    """
    job = facts(handle)
    out = {*_hosts(job.get("ExcNodeList", "")), *node_names}
    listing = ask("sinfo", "--noheader", "--Node", f"--partition={job['Partition']}", "--format=%N %T")
    needed = int(job["NumNodes"].partition("-")[0])
    if not leaves_enough(listing, out, asked_for=_hosts(job.get("ReqNodeList", "")), needed=needed):
        raise SlurmError(f"the job needs {needed} nodes, and too few of those that it may use would be left")
    ask("scontrol", "update", f"JobId={handle}", f"ExcNodeList={','.join(sorted(out))}")


def leaves_enough(listing: str, out: Collection[str], *, asked_for: Collection[str], needed: int) -> bool:
    """Whether a job can start without the nodes ``out``. Pure.

    Args:
        listing: the nodes of its partition, from ``sinfo --format="%N %T"``.
        out: nodes that it would leave out.
        asked_for: nodes that it must have (``--nodelist``).
        needed: how many it needs.
    """
    lines = [line.split() for line in listing.splitlines()]
    usable = {name for name, state, *_ in lines if re.fullmatch(_USABLE, state)}
    return not set(asked_for) & set(out) and len(usable - set(out)) >= needed


def requeue(handle: str) -> None:
    """Put the job back into the queue. SLURM ends the calling script too, by SIGTERM."""
    ask("scontrol", "requeue", handle)


def submit(script: str) -> str:
    """Hand a script to ``sbatch``; returns the job's id."""
    # "7;cluster" where several clusters are known
    environ = clean_environment(os.environ)
    return ask("sbatch", "--parsable", text=script, environ=environ).strip().partition(";")[0]


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` without what the job or the launcher has set in which it is asked for: sbatch hands it on.

    ``SLURM_CONF`` and a user's defaults (``SBATCH_*``) stay.
    """
    return {name: value for name, value in environ.items() if not _OF_A_JOB.fullmatch(name)}


def ask(*command: str, text: str = "", environ: Mapping[str, str] = os.environ) -> str:
    """What a command of SLURM prints. Times are in its standard format, whatever the user prefers.

    Raises:
        SlurmError: it is not installed, does not answer, or fails.
    """
    if shutil.which(command[0], path=environ.get("PATH")) is None:
        raise SlurmError(f"{command[0]} is not installed here; run this where SLURM's commands are")
    try:
        done = subprocess.run(
            command,
            env={**environ, "SLURM_TIME_FORMAT": "standard"},
            input=text,
            capture_output=True,
            text=True,
            timeout=_ASK_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{' '.join(command)}: no answer in {_ASK_TIMEOUT_S:g} s; try again") from None
    if done.returncode != 0:
        raise SlurmError(f"{' '.join(command)}: {done.stderr.strip() or f'status {done.returncode}'}")
    return done.stdout
