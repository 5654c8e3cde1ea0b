"""Run jobs on a private SLURM, all at the same time: submit them, act on them, and wait for their ends.

jobs = [Job("scancel", happens=lambda cluster, job: cluster.run("scancel", job.id)), ...]
run_all(cluster, jobs, corpus, folder)
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.runs import Run, make_run
from support.slurm_cluster import Cluster

STEPS = 60
SETTINGS = {"train.max_steps": STEPS, "checkpoint.interval": 0, "eval.interval": 0}
ENDED = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
MINUTES = 10
TIMEOUT_S = 1000.0
SCRIPT = Path(__file__).parent / "slow_train.py"

Facts = dict[str, str]
"""The output of ``scontrol show job``."""


def is_training(_cluster: Cluster, job: Job) -> bool:
    """Return whether the job has done a few steps."""
    return len(job.run.rows()) > 2


@dataclass
class Job:
    """A run as one SLURM job, and an action on it once it trains."""

    name: str
    options: list[str] = field(default_factory=list)
    """Options of sbatch."""
    happens: Callable[[Cluster, Job], object] = lambda _cluster, _job: None
    requeued: bool = True
    nodes: int = 1
    gpus: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    environ: dict[str, str | None] = field(default_factory=dict)
    """Environment variables of the submission, and therefore of the job; None removes a variable."""
    when: Callable[[Cluster, Job], bool] = is_training
    """Whether it is time for ``happens``."""
    after: Job | None = None
    """The job whose run this one continues. This one is submitted directly after it."""
    then: Callable[[Cluster], object] = lambda _cluster: None
    """Called repeatedly while the job is queued again. It must not wait, because other jobs are active."""

    arguments: list[str] = field(default_factory=list)
    """Options of ``submit``."""

    id: str = ""
    said: str = ""
    """The output of ``submit``."""
    run: Run = field(default_factory=Run)
    facts: Facts = field(default_factory=dict)
    has_happened: bool = False

    @property
    def log(self) -> str:
        found = [*(self.run.folder / "slurm").glob("*.log"), *self.run.base.glob("*.log")]
        return f"\n--- {self.name} ---\n" + "".join(path.read_text() for path in sorted(found))

    @property
    def restarts(self) -> int:
        return int(self.facts["Restarts"])

    def submit(self, cluster: Cluster, corpus: Path, folder: Path) -> None:
        """Submit the job with the command that users type."""
        if self.after is not None:
            self.run = self.after.run
        else:
            self.run = make_run(folder / self.name.replace(" ", "_"), corpus, **{**SETTINGS, **self.settings})
        environ = cluster.environ | {key: value for key, value in self.environ.items() if value is not None}
        for key in [key for key, value in self.environ.items() if value is None]:
            environ.pop(key, None)
        options = [option.replace("JOB", self.after.id) if self.after else option for option in self.options]
        command = [
            *(sys.executable, "-c", "from kempnerforge.cli.app import main; main()", "submit"),
            *(str(self.run.config), f"--nodes={self.nodes}", f"--time={MINUTES}"),
            *(f"--gpus-per-node={self.gpus}", f"--script={SCRIPT}", *self.arguments, "--", *options),
        ]
        done = subprocess.run(
            command, env=environ, cwd=self.run.base, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        self.said = done.stdout
        self.id = done.stdout.split()[1].rstrip(":")

    def go_on(self, cluster: Cluster, known: dict[str, Facts]) -> bool:
        """Do what is due and return whether the job has ended."""
        self.facts = known[self.id]
        if not self.has_happened and self.when(cluster, self):
            self.has_happened = True
            self.happens(cluster, self)
        elif self.has_happened and self.facts["JobState"] == "PENDING":
            self.then(cluster)
        _restore_limit(cluster, self.facts)
        return self.facts["JobState"] in ENDED


@dataclass
class Array(Job):
    """Two tasks, each with its own run. ``happens`` acts on the second one, ``run``."""

    other: Run = field(default_factory=Run)
    other_facts: Facts = field(default_factory=dict)

    def submit(self, cluster: Cluster, corpus: Path, folder: Path) -> None:
        self.options = [*self.options, "--array=0-1"]
        self.settings = {**self.settings, "run.dir": str(folder / "{job_id}_{array_task_id}")}
        super().submit(cluster, corpus, folder)

    def go_on(self, cluster: Cluster, known: dict[str, Facts]) -> bool:
        tasks = {
            facts["ArrayTaskId"]: facts for facts in known.values() if facts.get("ArrayJobId") == self.id
        }
        if set(tasks) != {"0", "1"}:  # SLURM separates the tasks when they start
            return False
        self.other_facts, self.facts = tasks["0"], tasks["1"]
        self.other = self._run_of(tasks["0"])
        self.run = self._run_of(tasks["1"])
        if not self.has_happened and self.when(cluster, self) and len(self.other.rows()) > 2:
            self.has_happened = True
            self.happens(cluster, self)
        return all(facts["JobState"] in ENDED for facts in tasks.values())

    def _run_of(self, facts: Facts) -> Run:
        folder = self.run.base.parent / f"{facts['JobId']}_{facts['ArrayTaskId']}"
        return Run(
            folder=folder, checkpoints=folder / "checkpoints", base=self.run.base, config=self.run.config
        )


@dataclass
class SweepJob(Array):
    """A sweep of two runs, to which nothing happens."""

    def submit(self, cluster: Cluster, corpus: Path, folder: Path) -> None:
        self.has_happened = True
        self.settings = {**self.settings, "run.dir": str(folder / "sweep")}
        Job.submit(self, cluster, corpus, folder)

    def _run_of(self, facts: Facts) -> Run:
        folder = self.run.base.parent / "sweep" / facts["ArrayTaskId"]
        return Run(
            folder=folder, checkpoints=folder / "checkpoints", base=self.run.base, config=self.run.config
        )


def kill_rank(job: Job, rank: int) -> None:
    """Kill a rank of the job, which runs on this host like all nodes of the cluster."""
    mark = {f"RANK={rank}".encode(), f"SLURM_JOB_ID={job.id}".encode()}
    for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
        try:
            environ = set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
        except OSError:  # it has ended
            continue
        if mark <= environ:
            os.kill(pid, signal.SIGKILL)


def run_all(cluster: Cluster, jobs: Sequence[Job], corpus: Path, folder: Path) -> None:
    """Submit all jobs, act on them when it is time, and wait for their ends."""
    deadline = time.monotonic() + TIMEOUT_S
    for job in jobs:
        job.submit(cluster, corpus, folder)
    left = list(jobs)
    while left:
        lines = cluster.run("scontrol", "-o", "show", "job").splitlines()
        all_facts = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]
        known = {facts["JobId"]: facts for facts in all_facts}
        left = [job for job in left if not job.go_on(cluster, known)]
        logs = "".join(job.log for job in left)
        assert time.monotonic() < deadline, f"not in time: {[job.name for job in left]}{logs}"
        time.sleep(0.5)


def near_the_limit(cluster: Cluster, job: Job) -> None:
    """Move the end of the job's time so near that SLURM announces it at its next check."""
    cluster.run("scontrol", "update", f"JobId={job.id}", "EndTime=now+115")


def _restore_limit(cluster: Cluster, facts: Facts) -> None:
    """Restore the limit that moving the end has shortened, also for the next start."""
    is_next = facts["JobState"] == "PENDING" or (facts["JobState"] == "RUNNING" and facts["Restarts"] != "0")
    if is_next and facts["TimeLimit"] != f"00:{MINUTES}:00":
        cluster.run("scontrol", "update", f"JobId={facts['JobId']}", f"TimeLimit={MINUTES}")
