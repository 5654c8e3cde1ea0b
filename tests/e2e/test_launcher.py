"""``kempnerforge train`` with real ranks: restarted in place, stopped, killed, on one node and on two."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.faulty_train import FAULTS
from support.polling import wait_until
from support.run_files import tensor_digests
from support.runs import Launcher, Run, make_run

from kempnerforge.goodput.history import read_history
from kempnerforge.process_identity import process_state

pytest_plugins = ["support.run_fixtures"]

SCRIPT = Path(__file__).parents[1] / "support/faulty_train.py"
COMMAND = [sys.executable, "-c", "from kempnerforge.cli.app import main; main()", "train"]
LAUNCHED_BY = re.compile("SLURM_|KEMPNERFORGE_(LAUNCHER|RESTART|STORE)|MASTER_|(LOCAL_)?(RANK|WORLD_SIZE)$")
WAIT_S = 200.0
"""A busy machine takes a minute to start the ranks."""
ENDLESS = {"train.max_steps": 100_000, "checkpoint.interval": 20, "eval.interval": 0}


class Started:
    """A launcher that runs, with its output in a file. Killed when it is closed."""

    def __init__(self, run: Run, *arguments: str, environ: dict[str, str] | None = None) -> None:
        run.starts += 1
        self.log = run.base / f"launcher_{run.starts}.log"
        inherited = {key: value for key, value in os.environ.items() if not LAUNCHED_BY.match(key)}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*COMMAND, str(run.config), f"--script={SCRIPT}", *arguments],
                env={**inherited, **(environ or {})},
                cwd=run.base,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    def ranks(self) -> list[int]:
        """Return the pids of the ranks."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def wait(self) -> int:
        return self.process.wait(WAIT_S)


@pytest.fixture
def started() -> Iterator[list[Started]]:
    launchers: list[Started] = []
    yield launchers
    for launcher in launchers:
        if launcher.process.poll() is None:
            launcher.process.kill()
            launcher.process.wait()


def train(started: list[Started], run: Run, *arguments: str, **environ: str) -> Started:
    started.append(Started(run, "--processes=2", *arguments, environ=environ))
    return started[-1]


def trains(run: Run) -> bool:
    return len(run.rows()) > 30


def assert_bitwise(run: Run, other: Run, step: int) -> None:
    assert run.counting() == other.counting()
    assert tensor_digests(run.step_folder(step)) == tensor_digests(other.step_folder(step))


def test_train_rank_killed_twice_restarts_in_place_bitwise(
    started: list[Started], launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    undisturbed = make_run(tmp_path / "undisturbed", corpus)
    launcher.finish(undisturbed, ranks=2)
    run = make_run(tmp_path / "killed", corpus)
    # Each start fails in its 6th step, after a commit: a single restart is allowed, and enough.
    done = train(started, run, "--train.max_restarts=1", **{FAULTS: "1 6 SIGKILL 2"})
    assert done.wait() == 0, done.output
    assert [receipt["step"] for receipt in run.receipts()] == [0, 4, 8]
    assert_bitwise(run, undisturbed, 12)
    for step in (4, 8):
        restarted = f"rank 1 was ended by SIGKILL. Restarting all ranks from step {step} (restart 1 of 1"
        assert restarted in done.output
    assert "error: lost another rank: " in done.output
    assert "Traceback" not in done.output


def test_train_faults_without_commit_end_with_their_status(
    started: list[Started], corpus: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path, corpus)
    done = train(started, run, "--train.max_restarts=1", **{FAULTS: "1 2 SIGKILL 9"})
    assert done.wait() == 128 + signal.SIGKILL, done.output
    assert [receipt["step"] for receipt in run.receipts()] == [0, 0]
    last = done.output.splitlines()[-1]
    assert last.startswith(
        "kempnerforge: rank 1 was ended by SIGKILL. Not restarted: 1 restart made no new commit"
    )


def test_train_own_faults_end_by_the_crash_loop_guard(
    started: list[Started], corpus: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path, corpus)
    done = train(started, run, "--run.max_faults_without_progress=2", **{FAULTS: "1 2 raise 9"})
    assert done.wait() == 76, done.output
    assert [attempt.kind for attempt in read_history(run.folder)] == ["fault", "fault", "blocked"]
    assert "kempnerforge: rank 1 on " in done.output
    assert "[rank 1]" in done.output
    assert "ValueError: no such luck (see " in done.output
    assert "kempnerforge unblock" in done.output.splitlines()[-1]


def test_train_fault_without_restarts_ends_with_its_status(
    started: list[Started], corpus: Path, tmp_path: Path
) -> None:
    done = train(started, make_run(tmp_path, corpus), "--train.max_restarts=0", **{FAULTS: "0 6 raise 9"})
    assert done.wait() == 1, done.output
    assert "Not restarted (train.max_restarts = 0)" in done.output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_train_stop_signal_commits_and_exits_75(
    started: list[Started], corpus: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run = make_run(tmp_path, corpus, **ENDLESS | {"checkpoint.interval": 0})
    one = train(started, run)
    wait_until(lambda: trains(run), "training", timeout_s=WAIT_S)
    one.process.send_signal(signal.SIGUSR2)
    wait_until(run.committed, "the save that SIGUSR2 requests", timeout_s=WAIT_S)
    if number == signal.SIGINT:
        os.killpg(one.process.pid, number)  # as Ctrl-C in a terminal does
    else:
        one.process.send_signal(number)
    assert one.wait() == 75, one.output
    step = run.record["last_exit"]["step"]
    assert run.committed()[0] == step
    stopped = f"stopped by {number.name} at step {step}, which is committed"
    assert one.output.splitlines()[-1].startswith(stopped)
    assert len(run.receipts()) == 1
    assert "Traceback" not in one.output


def test_train_stopped_during_start_exits_75_without_traceback(
    started: list[Started], corpus: Path, tmp_path: Path
) -> None:
    """The ranks import torch for seconds, and cannot handle the signal before."""
    one = train(started, make_run(tmp_path, corpus, **ENDLESS))
    wait_until(one.ranks, "ranks")
    one.process.send_signal(signal.SIGINT)
    assert one.wait() == 75, one.output
    assert one.output.splitlines() == [
        "stopped by SIGINT during setup, before a step. Run the same command to resume"
    ]


def test_train_launcher_killed_leaves_no_rank(started: list[Started], corpus: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, corpus, **ENDLESS)
    one = train(started, run)
    wait_until(lambda: trains(run), "training", timeout_s=WAIT_S)
    ranks = one.ranks()
    assert len(ranks) == 2
    one.process.kill()
    one.process.wait()
    wait_until(lambda: all(_has_ended(pid) for pid in ranks), "end of the ranks")


def _has_ended(pid: int) -> bool:
    state = process_state(pid)
    return state is None or state.has_exited


@pytest.mark.smoke
def test_train_invalid_config_exits_2_before_torch(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[train]\nsed = 1\n")
    code = "import sys; from kempnerforge.cli.app import main\ntry:\n    main()\n"
    code += "finally:\n    assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "train", "bad.toml", "--processes=2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "train.sed: is not a known key; did you mean train.seed?" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bad.toml"]


# Two nodes: two launchers with the variables of a job step


def on_node(started: list[Started], run: Run, node: int, *arguments: str, **environ: Any) -> Started:
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost,n2"}
    step |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": str(node)}
    step |= {"KEMPNERFORGE_LINK_SECRET": "only the owner of the job knows this"}
    started.append(Started(run, "--processes=1", *arguments, environ={**step, **environ}))
    return started[-1]


def test_train_rank_killed_on_one_node_restarts_all_nodes(
    started: list[Started], launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    undisturbed = make_run(tmp_path / "undisturbed", corpus)
    launcher.finish(undisturbed, ranks=2)
    run = make_run(tmp_path / "killed", corpus)
    other = on_node(started, run, 1, **{FAULTS: "1 6 SIGKILL 1"})
    head = on_node(started, run, 0)
    assert (head.wait(), other.wait()) == (0, 0), head.output + other.output
    assert [receipt["step"] for receipt in run.receipts()] == [0, 4]
    assert_bitwise(run, undisturbed, 12)
    assert "rank 1 was ended by SIGKILL. Restarting all ranks from step 4" in head.output
    assert other.output == ""


def test_train_stop_on_one_node_stops_all_nodes(started: list[Started], corpus: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, corpus, **ENDLESS)
    head, other = (on_node(started, run, node) for node in (0, 1))
    wait_until(lambda: trains(run), "training", timeout_s=WAIT_S)
    (rank,) = other.ranks()
    assert b"KEMPNERFORGE_LINK_SECRET" not in Path(f"/proc/{rank}/environ").read_bytes()
    other.process.send_signal(signal.SIGTERM)
    assert (head.wait(), other.wait()) == (75, 75), head.output + other.output


@pytest.mark.parametrize("lost", [0, 1])
def test_train_lost_node_ends_the_other(
    started: list[Started], corpus: Path, tmp_path: Path, lost: int
) -> None:
    """SLURM's requeue is for that: the remaining node cannot train alone."""
    run = make_run(tmp_path, corpus, **ENDLESS)
    nodes = [on_node(started, run, node) for node in (0, 1)]
    wait_until(lambda: trains(run), "training", timeout_s=WAIT_S)
    nodes[lost].process.kill()
    assert nodes[1 - lost].wait() == 1, nodes[1 - lost].output
    assert f"lost the connection to the launcher of node {lost}" in nodes[1 - lost].output


def test_train_invalid_config_is_printed_with_its_node(
    started: list[Started], corpus: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path, corpus)
    head, other = (on_node(started, run, node, "--train.sed=1") for node in (0, 1))
    assert (head.wait(), other.wait()) == (2, 2)
    assert "--train.sed: is not a known key" in head.output
    assert other.output == f"node 1: {head.output}"
