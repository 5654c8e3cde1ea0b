"""The time at which SLURM ends this job, from the environment, updated by queries of ``squeue``."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from datetime import datetime

from kempnerforge.slurm import job as slurm_job
from kempnerforge.slurm.job import SlurmError, SlurmJob

QUERY_INTERVAL_S = 60.0
"""Time between queries, because ``scontrol update EndTime`` can change the end of a running job."""


def end_in_environment(environ: Mapping[str, str]) -> float | None:
    """Return ``SLURM_JOB_END_TIME``, which is Unix time; None if it is not set (SLURM before 23.02)."""
    text = environ.get("SLURM_JOB_END_TIME", "")
    return float(text) if text.isdecimal() else None


def parse_end(text: str) -> float | None:
    """Convert the output of ``squeue -o %e``, local time, to Unix time; None for ``N/A``, a job without end.

    Raises ValueError for any other text.
    """
    lines = text.split()
    if not lines:
        raise ValueError("squeue does not know the job")
    if lines[0].upper() in ("N/A", "NONE", "UNKNOWN"):
        return None
    return datetime.fromisoformat(lines[0]).timestamp()


class JobEnd:
    """The end of this SLURM job, kept up to date by a thread. Only rank 0 uses it: one query per minute."""

    def __init__(self, job: SlurmJob, environ: Mapping[str, str] = os.environ) -> None:
        end = end_in_environment(environ)
        is_past = end is not None and end <= time.time()
        self.at = None if is_past else end
        """Unix time; None if unknown, and for a job without a limit."""
        self.problem = (
            "SLURM_JOB_END_TIME is in the past, perhaps from another job, and is ignored" if is_past else ""
        )
        """Why the end is uncertain, for example because the last ``squeue`` failed. The last known
        end still applies."""
        self._handle = job.handle
        self._environ = dict(environ)
        self._closed = threading.Event()
        threading.Thread(target=self._poll, name="slurm-deadline", daemon=True).start()

    def close(self) -> None:
        """Stop the queries."""
        self._closed.set()

    def _poll(self) -> None:
        while not self._closed.is_set():
            try:
                text = slurm_job.query("squeue", "-h", "-j", self._handle, "-o", "%e", environ=self._environ)
                self.at = parse_end(text)
                self.problem = ""
            except (SlurmError, ValueError) as error:
                self.problem = str(error)
            self._closed.wait(QUERY_INTERVAL_S)
