"""Run a training job to its end through a given sequence of kills, and measure it from outside.

All times are by the clock of this process. The time of a row in the job's log is the moment at
which this process can read it. A kill is SIGKILL to all processes of the job at once: launcher,
ranks, and their children.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MARK = "KEMPNERFORGE_BENCH_JOB"
"""Environment variable that all processes of a job inherit, and no other process has."""
POLL_S = 0.01
MAX_ATTEMPTS = 200
TAIL_CHARS = 3000
LAUNCHERS = ("torchrun", "ranks")


class BenchError(Exception):
    """A job failed: it neither finished nor was killed by the benchmark."""


@dataclass
class Attempt:
    """One start of a job, as measured from outside. Times are seconds of this process's monotonic clock."""

    launched: float
    newest_before: int
    """The newest step to resume from when it was launched; 0 for none."""
    ended: float = 0.0
    """When the last of its processes had ended."""
    killed_after_s: float | None = None
    """Seconds from its launch to the kill; None if it ended by itself."""
    steps: list[tuple[float, int, float]] = field(default_factory=list)
    """(time at which this process read the row, step, loss) of each finished step."""
    saves: list[dict[str, Any]] = field(default_factory=list)
    """``step``, ``seen``, ``blocking_s`` and ``total_s`` of each save that the job reported."""

    @property
    def began_at(self) -> int | None:
        """The step that it resumed from; None if it completed no step."""
        return self.steps[0][1] - 1 if self.steps else None

    @property
    def last_step(self) -> int | None:
        """The last step that it completed, as far as this process knows."""
        return self.steps[-1][1] if self.steps else None


@dataclass(frozen=True)
class Job:
    """A job to start, and its files."""

    name: str
    program: Sequence[str]
    """Script and arguments of a rank."""
    rows: Path
    """JSON lines that the job appends: ``train/loss`` with ``step``, ``checkpoint/step`` with its timings."""
    log: Path
    """The output of the processes."""
    newest: Callable[[], int]
    """Returns the newest step on disk to resume from; 0 for none."""
    num_ranks: int
    launcher: str = "torchrun"
    """``torchrun``, or ``ranks``: one process per rank, as ``srun`` starts them."""


def run_to_end(job: Job, gaps: Iterator[float], *, delay_s: float) -> list[Attempt]:
    """Start ``job`` again and again until it ends by itself. Return its attempts.

    The n-th attempt is killed when its age in seconds is the n-th of ``gaps``. Attempts after the
    last of ``gaps`` are not killed. Each launch follows ``delay_s`` after the end of the attempt
    before it. Raises BenchError.
    """
    attempts: list[Attempt] = []
    rows = RowReader(job.rows)
    while not attempts or attempts[-1].killed_after_s is not None:
        if len(attempts) == MAX_ATTEMPTS:
            raise BenchError(f"{job.name}: not done after {MAX_ATTEMPTS} attempts; see {job.log}")
        if attempts:
            time.sleep(delay_s)
        attempts.append(_run_once(job, rows, next(gaps, None)))
    return attempts


def _run_once(job: Job, rows: RowReader, gap_s: float | None) -> Attempt:
    attempt = Attempt(time.monotonic(), job.newest())
    with started(job) as processes:
        while any(process.poll() is None for process in processes):
            age_s = time.monotonic() - attempt.launched
            rows.read_into(attempt)
            if gap_s is not None and age_s >= gap_s:
                attempt.killed_after_s = age_s
                break
            if any(process.returncode for process in processes):
                break
            time.sleep(POLL_S)
        statuses = [process.returncode for process in processes]
    attempt.ended = time.monotonic()
    rows.read_into(attempt)
    if attempt.killed_after_s is None and any(statuses):
        tail = job.log.read_text(errors="replace")[-TAIL_CHARS:]
        raise BenchError(f"{job.name} failed with status {statuses}; the end of {job.log}:\n{tail}")
    return attempt


@contextmanager
def started(job: Job) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start the launcher of the job, or its ranks. At the end of the block all its processes are dead."""
    mark = uuid.uuid4().hex
    environment = {**os.environ, MARK: mark}
    processes: list[subprocess.Popen[bytes]] = []
    job.log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with job.log.open("ab") as log:
            for command, extra in _commands(job):
                processes.append(
                    subprocess.Popen(
                        command,
                        env={**environment, **extra},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
                )
        yield processes
    finally:
        kill_marked(mark, processes)


def _commands(job: Job) -> Iterator[tuple[list[str], dict[str, str]]]:
    if job.launcher not in LAUNCHERS:
        raise BenchError(f"unknown launcher {job.launcher!r}; use one of {', '.join(LAUNCHERS)}")
    if job.launcher == "torchrun":
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(job.num_ranks)]
        yield [sys.executable, *launcher, *job.program], {}
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    for rank in range(job.num_ranks):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job.num_ranks)}
        yield [sys.executable, *job.program], {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def kill_marked(mark: str, processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kill every process whose environment has ``mark``, until none is left, and reap ``processes``."""
    while pids := marked(mark):
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for process in processes:
            process.poll()
    for process in processes:
        process.wait()


def marked(mark: str) -> list[int]:
    """Return the living processes whose environment has ``mark``."""
    wanted = f"{MARK}={mark}".encode()
    pids = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                content = Path(f"/proc/{entry}/environ").read_bytes()
            except OSError:  # ended meanwhile, or of another user
                continue
            if wanted in content.split(b"\0"):
                pids.append(int(entry))
    return pids


class RowReader:
    """Reads a growing file of JSON lines over all attempts of a job."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""

    def read_into(self, attempt: Attempt) -> None:
        """Add the lines that were appended since the last call to ``attempt``. Torn lines are skipped."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                new = file.read()
        except FileNotFoundError:
            return
        seen = time.monotonic()
        self._offset += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if "train/loss" in row:
                attempt.steps.append((seen, row["step"], row["train/loss"]))
            if "checkpoint/step" in row:
                timings = {name: row[f"checkpoint/{name}"] for name in ("step", "blocking_s", "total_s")}
                attempt.saves.append({"seen": seen, **timings})
