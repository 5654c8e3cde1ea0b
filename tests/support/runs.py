"""Start real training attempts from a test, and read the files that they leave.

    def test_something(launcher, tmp_path):
        run = make_run(tmp_path, **{"train.max_steps": 8})
        ended = launcher.run(run, ranks=2)
        assert ended.statuses == [0, 0], ended.output
        assert run.committed() == [8]

An attempt is like a start of ``torchrun scripts/train.py``: one process per rank, all in a process
group of their own, forked from a server that has done the imports (``fork_server.py``). Use the
fixtures with ``pytest_plugins = ["support.run_fixtures"]``.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.run_files import RunFiles

from kempnerforge.goodput.faults import FOLDER as FAULTS_FOLDER

FORK_SERVER = Path(__file__).with_name("fork_server.py")
Fault = tuple[str, dict[str, Any]]
"""Name of a function of ``fault_injection.py`` and its arguments. The ranks of an attempt call it first."""


@dataclass(frozen=True)
class Ended:
    """How an attempt ended."""

    statuses: list[int]
    """Exit status of every rank; -9 for a rank that SIGKILL ended."""
    outputs: list[str]
    """The output of every rank."""

    @property
    def output(self) -> str:
        """The output of all ranks."""
        return "".join(f"--- rank {rank} ---\n{text}" for rank, text in enumerate(self.outputs))


class Attempt:
    """A running attempt. Its processes are killed when it is closed."""

    def __init__(self, connection: socket.socket, logs: Sequence[Path], faults: Path) -> None:
        """``faults`` is the folder where the run's processes write their stacks after a fatal signal."""
        self._connection = connection
        self._faults = faults
        self._answers = connection.makefile("rb")
        self._logs = logs
        self._ended: Ended | None = None
        connection.settimeout(120)
        self.pids: list[int] = json.loads(self._answers.readline())["pids"]

    def signal(self, number: signal.Signals, *, rank: int | None = None) -> None:
        """Send a signal to one rank, or to the whole process group."""
        if rank is None:
            os.killpg(self.pids[0], number)
        else:
            os.kill(self.pids[rank], number)

    def kill(self) -> None:
        """Send SIGKILL to the whole process group. Do nothing if it has ended."""
        try:
            os.killpg(self.pids[0], signal.SIGKILL)
        except ProcessLookupError:
            return

    def wait(self, timeout_s: float = 120.0) -> Ended:
        """Wait until all ranks have ended. Fail the test, with all output, if they do not."""
        if self._ended is None:
            self._connection.settimeout(timeout_s)
            try:
                statuses = json.loads(self._answers.readline())["statuses"]
            except TimeoutError:
                for pid in self.pids:
                    subprocess.run(["kill", "-USR2", str(pid)], check=False)
                time.sleep(0.5)
                self.close()
                pytest.fail(f"the attempt has not ended after {timeout_s} s\n{self._describe([])}")
            self._ended = self._describe(statuses)
            self.close()
        return self._ended

    def close(self) -> None:
        """Kill the processes that still run."""
        self._answers.close()
        self._connection.close()

    def output(self) -> str:
        """Return the output of all ranks so far."""
        return self._describe([]).output

    def _describe(self, statuses: list[int]) -> Ended:
        outputs = [log.read_text(errors="replace") if log.exists() else "" for log in self._logs]
        for rank, status in enumerate(statuses):
            if status in (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS):
                for path in self._faults.glob(f"*.rank_{rank:05d}.txt"):
                    outputs[rank] += path.read_text(errors="replace")
        return Ended(statuses, outputs)


class Launcher:
    """Starts attempts. There is one launcher per test session."""

    def __init__(self) -> None:
        self._requests, theirs = socket.socketpair()
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, str(FORK_SERVER), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def close(self) -> None:
        """End the server."""
        self._requests.close()
        self._server.wait(30)

    def start(
        self,
        run: Run,
        *overrides: str,
        ranks: int = 1,
        faults: Sequence[Fault] = (),
        command: Sequence[str] = (),
    ) -> Attempt:
        """Start the run's command, or ``kempnerforge command``, on ``ranks`` ranks, as another attempt."""
        run.starts += 1
        logs = [run.base / f"start_{run.starts}.rank_{rank}.log" for rank in range(ranks)]
        common = {
            **{key: value for key, value in os.environ.items() if not key.startswith("SLURM_")},
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
        }
        request = {
            "program": "kempnerforge.cli.app" if command else "kempnerforge.cli.train",
            "arguments": [*command, *overrides] if command else [f"--config={run.config}", *overrides],
            "cwd": str(run.base),
            "faults": [["support.fault_injection", *fault] for fault in faults],
            "ranks": [
                {"log": str(log), "env": {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}}
                for rank, log in enumerate(logs)
            ],
        }
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._requests, [json.dumps(request).encode()], [theirs.fileno()])
        return Attempt(ours, logs, run.folder / FAULTS_FOLDER)

    def run(
        self,
        run: Run,
        *overrides: str,
        ranks: int = 1,
        faults: Sequence[Fault] = (),
        command: Sequence[str] = (),
        timeout_s: float = 120.0,
    ) -> Ended:
        """Call ``start`` and ``wait``."""
        return self.start(run, *overrides, ranks=ranks, faults=faults, command=command).wait(timeout_s)

    def finish(self, run: Run, *overrides: str, ranks: int = 1) -> Ended:
        """Call ``run``, which must end with status 0 on all ranks."""
        ended = self.run(run, *overrides, ranks=ranks)
        assert ended.statuses == [0] * ranks, ended.output
        return ended


def _free_port() -> int:
    """Return a port outside the range of outgoing connections, so that it remains free."""
    while True:
        port = random.SystemRandom().randrange(12000, 30000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


@dataclass
class Run(RunFiles):
    """A run of a test: its config, and the folder that it creates."""

    base: Path = field(default_factory=Path)
    config: Path = field(default_factory=Path)
    starts: int = 0
    """Number of attempts that were started from here."""


TINY: dict[str, Any] = {
    "model.dim": 32,
    "model.n_layers": 2,
    "model.n_heads": 2,
    "model.max_seq_len": 32,
    "train.global_batch_size": 4,
    "train.batch_size": 1,
    "train.seq_len": 32,
    "train.max_steps": 12,
    "train.mixed_precision": "fp32",
    "optimizer.lr": 3e-3,
    "scheduler.name": "constant",
    "scheduler.warmup_steps": 3,
    "eval.interval": 4,
    "eval.num_batches": 2,
    "data.val_fraction": 0.1,
    "checkpoint.interval": 4,
    "distributed.timeout_s": 40.0,
    "metrics.log_interval": 1,
}


def make_run(base: Path, corpus: Path, **settings: Any) -> Run:
    """Write the config of a new tiny run in ``base``. ``settings`` has dotted keys; None omits a key."""
    base.mkdir(parents=True, exist_ok=True)
    values = {"data.text": [str(corpus / "*.txt")], "run.dir": str(base / "run"), **TINY, **settings}
    config = base / "config.toml"
    lines = [f"{key} = {_toml(value)}" for key, value in values.items() if value is not None]
    config.write_text("\n".join(lines) + "\n")
    folder = Path(values["run.dir"])
    checkpoints = Path(values.get("checkpoint.dir") or folder / "checkpoints")
    return Run(folder=folder, checkpoints=checkpoints, base=base, config=config)


def _toml(value: Any) -> str:
    return json.dumps(value)


def copy_run(run: Run, target: Path) -> Run:
    """Copy ``run`` to ``target``, to resume from it without changing the original."""
    shutil.copytree(run.base, target, symlinks=True)
    config = target / run.config.name
    config.write_text(run.config.read_text().replace(str(run.base), str(target)))
    folder = target / run.folder.relative_to(run.base)
    return Run(folder=folder, checkpoints=folder / "checkpoints", base=target, config=config)


def write_corpus(folder: Path, *, seed: int) -> Path:
    """Write eight files of words, the same for the same seed."""
    generator = random.Random(seed)
    folder.mkdir(exist_ok=True)
    words = ["".join(generator.choices("abcdefgh", k=generator.randint(2, 6))) for _ in range(40)]
    for number in range(8):
        text = " ".join(generator.choices(words, k=140))
        (folder / f"text_{number}.txt").write_text(text + "\n")
    return folder
