"""Identify the process that holds a lease, uniquely among all processes that ever ran.

A process id alone is not enough: it is reused, and it is meaningless on another host, after a
reboot or in another container. Boot id, pid namespace, pid and start time together identify one
process of one kernel.
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
"""Width of the counter in the file, so that a lease file always has the same length."""


@dataclass(frozen=True)
class ProcessIdentity:
    """A process that holds, or held, the lease of a run."""

    attempt: int
    token: str
    """Random, different for each lease."""
    host: str
    boot_id: str
    """Boot id of the kernel. It changes with every boot and differs between hosts."""
    pid_namespace: str
    """Id of the pid namespace. Each container on a host has its own pids."""
    pid: int
    start_ticks: int
    """Start time of the process in clock ticks since boot; -1 if unknown."""
    started: float
    """Start time in seconds since the epoch by the holder's clock. For display only."""
    slurm_job_id: str = ""
    slurm_restart_count: int = 0
    rank_pids: Sequence[int] = ()
    """Processes of all ranks on this host, if known. Any of them may outlive the others."""

    @classmethod
    def of_this_process(cls, attempt: int, environ: Mapping[str, str] = os.environ) -> ProcessIdentity:
        """Return the identity of this process, for the lease of ``attempt``."""
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
        """Describe the process for a message."""
        job = f", SLURM job {self.slurm_job_id}" if self.slurm_job_id else ""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        return f"attempt {self.attempt}, pid {self.pid} on {self.host}{job}, since {since}"

    def stop_command(self, observer: ProcessIdentity) -> str:
        """Return the command with which ``observer`` ends this process, without ending itself."""
        if self.slurm_job_id and self.slurm_job_id != observer.slurm_job_id:
            return f"scancel {self.slurm_job_id}"
        return f"kill {' '.join(map(str, self.rank_pids or [self.pid]))} (on {self.host})"

    def has_ended(self, observer: ProcessIdentity) -> bool:
        """Return whether this process has certainly ended.

        Return False if ``observer`` cannot know, because it runs under another kernel or in another
        pid namespace, or because the start time is unknown. Return True also if its pid now
        belongs to a process with a different start time.
        """
        same_kernel = bool(self.boot_id) and self.boot_id == observer.boot_id
        if not same_kernel or self.pid_namespace != observer.pid_namespace or self.start_ticks < 0:
            return False
        state = process_state(self.pid)
        if state is None:
            return not _answers(self.pid)
        return state.has_exited or state.start_ticks != self.start_ticks

    def is_superseded_by(self, other: ProcessIdentity) -> bool:
        """Return whether ``other`` is a later start of the same SLURM job.

        SLURM ends a job before it requeues it.
        """
        same_job = bool(self.slurm_job_id) and self.slurm_job_id == other.slurm_job_id
        return same_job and other.slurm_restart_count > self.slurm_restart_count


def restart_count(environ: Mapping[str, str]) -> int:
    """Return how often SLURM has restarted this job. SLURM does not set the variable at the first start."""
    restarts = environ.get("SLURM_RESTART_COUNT", "")
    return int(restarts) if restarts.isdecimal() else 0


@dataclass(frozen=True)
class ProcessState:
    """The state of a process in the kernel."""

    start_ticks: int
    has_exited: bool
    """Whether it has ended and its parent has not collected its status yet."""


def process_state(pid: int) -> ProcessState | None:
    """Return the state of a process of this host; None if it does not exist or is not visible."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # The name, in parentheses, may itself contain spaces and parentheses.
    fields = stat.rpartition(")")[2].split()
    return ProcessState(start_ticks=int(fields[19]), has_exited=fields[0] in ("Z", "X"))


def encode(holder: ProcessIdentity, *, counter: int, released: bool) -> bytes:
    """Return the bytes of a lease file: JSON whose length does not depend on ``counter`` or ``released``.

    The counter is a string of digits, so that a reader that sees a partial write still finds valid
    JSON.
    """
    body = json.dumps(asdict(holder))
    state = "true " if released else "false"
    return f'{body[:-1]}, "released": {state}, "counter": "{counter:0{COUNTER_DIGITS}}"}}\n'.encode()


def decode(data: bytes) -> tuple[ProcessIdentity, bool] | None:
    """Return the holder in a lease file and whether it has released the lease; None for invalid bytes."""
    try:
        body = json.loads(data)
        released = body.pop("released")
        del body["counter"]
        return ProcessIdentity(**body), released is True
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def boot_id() -> str:
    """Return the boot id of this kernel, also in a container; empty if it is not available."""
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
    """Return whether a process exists, even if a ``hidepid`` mount of /proc hides it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
