"""Who holds a lease: a process, told apart from every other one that ever ran.

A process id alone says little: it is reused, and it means nothing on another host, after a reboot or in
another container. Boot id, pid namespace, pid and start time together name one process of one kernel.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

COUNTER_DIGITS = 20
"""Width of the counter in the file, so that every state of a lease has the same length."""


@dataclass(frozen=True)
class ProcessIdentity:
    """One process that holds, or held, the lease of a run."""

    attempt: int
    token: str
    """Random: no two leases share it."""
    host: str
    boot_id: str
    """The kernel's; it changes with every boot and differs between hosts."""
    pid_namespace: str
    """Containers on one host each count their own pids."""
    pid: int
    start_ticks: int
    """When the process started, in clock ticks since the boot; -1 where that cannot be read."""
    started: float
    """Seconds since the epoch by the holder's clock. For people: nothing is decided by it."""
    slurm_job_id: str = ""
    slurm_restart_count: int = 0
    rank_pids: Sequence[int] = ()
    """The processes of all ranks on this host, when they are known: any of them may outlive the others."""

    @classmethod
    def of_this_process(cls, attempt: int, environ: Mapping[str, str] = os.environ) -> ProcessIdentity:
        """This process as the holder of ``attempt``."""
        state = process_state(os.getpid())
        return cls(
            attempt=attempt,
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            boot_id=boot_id(),
            pid_namespace=_pid_namespace(),
            pid=os.getpid(),
            start_ticks=state.start_ticks if state else -1,
            started=time.time(),
            slurm_job_id=environ.get("SLURM_JOB_ID", ""),
            slurm_restart_count=restart_count(environ),
        )

    def describe(self) -> str:
        """Who it is, for a message."""
        job = f", SLURM job {self.slurm_job_id}" if self.slurm_job_id else ""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        return f"attempt {self.attempt}, pid {self.pid} on {self.host}{job}, since {since}"

    def stop_command(self, observer: ProcessIdentity) -> str:
        """What ``observer`` types to end it, and not itself."""
        if self.slurm_job_id and self.slurm_job_id != observer.slurm_job_id:
            return f"scancel {self.slurm_job_id}"
        return f"kill {' '.join(map(str, self.rank_pids or [self.pid]))} (on {self.host})"

    def has_ended(self, observer: ProcessIdentity) -> bool:
        """Whether this process is known to be gone: only a process of the same kernel can tell.

        True also when its pid now belongs to a process that started at another time.
        """
        same_kernel = bool(self.boot_id) and self.boot_id == observer.boot_id
        if not same_kernel or self.pid_namespace != observer.pid_namespace or self.start_ticks < 0:
            return False
        state = process_state(self.pid)
        if state is None:
            return not _answers(self.pid)
        return state.has_exited or state.start_ticks != self.start_ticks

    def is_superseded_by(self, other: ProcessIdentity) -> bool:
        """Whether ``other`` is a later start of the same SLURM job, which is ended before it is requeued."""
        same_job = bool(self.slurm_job_id) and self.slurm_job_id == other.slurm_job_id
        return same_job and other.slurm_restart_count > self.slurm_restart_count


def restart_count(environ: Mapping[str, str]) -> int:
    """How often SLURM has started this job again. SLURM leaves it unset in a job's first run."""
    restarts = environ.get("SLURM_RESTART_COUNT", "")
    return int(restarts) if restarts.isdecimal() else 0


@dataclass(frozen=True)
class ProcessState:
    """What the kernel says of a process."""

    start_ticks: int
    has_exited: bool
    """It has ended, and its parent has not asked for its status yet."""


def process_state(pid: int) -> ProcessState | None:
    """The state of a process of this host; None when it is gone or cannot be seen."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # The name, in parentheses, may hold spaces and parentheses itself.
    fields = stat.rpartition(")")[2].split()
    return ProcessState(start_ticks=int(fields[19]), has_exited=fields[0] in ("Z", "X"))


def encode(holder: ProcessIdentity, *, counter: int, released: bool) -> bytes:
    """The bytes of a lease file: JSON of one length whatever counter and state are.

    The counter is a string of digits, so that a read that meets a write half done finds JSON all the same.
    """
    known = json.dumps(asdict(holder))
    state = "true " if released else "false"
    return f'{known[:-1]}, "released": {state}, "counter": "{counter:0{COUNTER_DIGITS}}"}}\n'.encode()


def decode(data: bytes) -> tuple[ProcessIdentity, bool] | None:
    """The holder in a lease file, and whether it has released it; None for bytes that are no lease."""
    try:
        body = json.loads(data)
        released = body.pop("released")
        del body["counter"]
        return ProcessIdentity(**body), released is True
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def boot_id() -> str:
    """Return the id of this boot of this kernel, also in a container; empty where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _answers(pid: int) -> bool:
    """Whether a process exists, asked in a way that ``hidepid`` mounts of /proc do not hide."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
