"""When SLURM ends this job: from the environment, and from ``squeue``, which knows when that was moved."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from datetime import datetime

from kempnerforge.slurm import job as slurm_job
from kempnerforge.slurm.job import SlurmError, SlurmJob

ASK_EVERY_S = 60.0
"""``scontrol update EndTime`` moves the end of a running job."""


def end_in_environment(environ: Mapping[str, str]) -> float | None:
    """``SLURM_JOB_END_TIME``, Unix time in seconds; None where SLURM (before 23.02) does not set it."""
    text = environ.get("SLURM_JOB_END_TIME", "")
    return float(text) if text.isdecimal() else None


def parse_end(text: str) -> float | None:
    """What ``squeue -o %e`` prints, local time, as Unix time; None for a job without an end (``N/A``).

    Raises ValueError for anything else.
    """
    lines = text.split()
    if not lines:
        raise ValueError("squeue does not know the job")
    if lines[0].upper() in ("N/A", "NONE", "UNKNOWN"):
        return None
    return datetime.fromisoformat(lines[0]).timestamp()


class JobEnd:
    """The end of this SLURM job, kept up to date by a thread. For rank 0: one question a minute for a job."""

    def __init__(self, job: SlurmJob, environ: Mapping[str, str] = os.environ) -> None:
        told = end_in_environment(environ)
        is_past = told is not None and told <= time.time()
        self.at = None if is_past else told
        """Unix time; None while it is not known, and for a job without a limit."""
        self.problem = "SLURM_JOB_END_TIME is past, another job's perhaps, and is ignored" if is_past else ""
        """Why the end is not known for sure: ``squeue`` could not be asked the last time, say. What was known
        before still counts."""
        self._handle = job.handle
        self._environ = dict(environ)
        self._closed = threading.Event()
        threading.Thread(target=self._keep_asking, name="slurm-deadline", daemon=True).start()

    def close(self) -> None:
        """Ask no more."""
        self._closed.set()

    def _keep_asking(self) -> None:
        while not self._closed.is_set():
            try:
                text = slurm_job.ask("squeue", "-h", "-j", self._handle, "-o", "%e", environ=self._environ)
                self.at = parse_end(text)
                self.problem = ""
            except (SlurmError, ValueError) as error:
                self.problem = str(error)
            self._closed.wait(ASK_EVERY_S)
