"""Real jobs on a real SLURM: stopped in its ways, saved, requeued when they should be, and bitwise.

All scenarios run at the same time in one private cluster, because most of each is waiting.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from run_files import tensor_digests
from runs import Launcher, Run, make_run
from slurm_cluster import Cluster, missing_programs

pytest_plugins = ["run_fixtures"]

REQUIRED = "KEMPNERFORGE_TEST_SLURM"
"""Set by ``.ci/run``: there a missing SLURM is a failure."""
if (_missing := missing_programs()) and not os.environ.get(REQUIRED):
    pytest.skip(f"SLURM cannot be started here: no {', '.join(_missing)}", allow_module_level=True)

STEPS = 60
ENDED = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
SETTINGS = {"train.max_steps": STEPS, "checkpoint.interval": 0, "eval.interval": 0}
TESTS = Path(__file__).parent
TIMEOUT_S = 500.0


@dataclass
class Scenario:
    """A run as one SLURM job, and what happens to it once it trains."""

    name: str
    happens: Callable[[Cluster, str], object]
    options: list[str]
    requeued: bool = True
    gpus: str = "0"
    time: str = "10"
    job: str = ""
    run: Run = field(default_factory=Run)

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in sorted((self.run.folder / "slurm").glob("*.log")))


def preempt(cluster: Cluster, _job: str) -> None:
    """A job that needs all GPUs of two nodes, of which two jobs of lower partitions have some."""
    gpus = "--gpus-per-node=4"
    cluster.run(
        "sbatch", "--partition=high", "--nodelist=n1,n2", "-N2", gpus, "-o/dev/null", "--wrap=sleep 1"
    )


def node_down(cluster: Cluster, _job: str) -> None:
    cluster.run("scontrol", "update", "NodeName=n3", "State=DOWN", "Reason=test")
    cluster.run("scontrol", "update", "NodeName=n3", "State=RESUME")


def near_the_limit(cluster: Cluster, job: str) -> None:
    cluster.run("scontrol", "update", f"JobId={job}", "EndTime=now+60")


SCENARIOS = {
    one.name: one
    for one in (
        Scenario("without grace", lambda *_: None, ["--partition=low", "--nodelist=n1,n2"], gpus="1"),
        Scenario("with grace", preempt, ["--partition=low_with_grace", "--nodelist=n1,n2"], gpus="1"),
        Scenario("time limit", near_the_limit, ["--nodelist=n1,n2"]),
        Scenario(
            "scontrol requeue",
            lambda cluster, job: cluster.run("scontrol", "requeue", job),
            ["--nodelist=n1,n2"],
        ),
        Scenario("node down", node_down, ["--nodelist=n1,n3"]),
        Scenario(
            "scancel", lambda cluster, job: cluster.run("scancel", job), ["--nodelist=n1,n2"], requeued=False
        ),
        Scenario(
            "scancel -s USR1",
            lambda cluster, job: cluster.run("scancel", "-s", "USR1", job),
            ["--nodelist=n1,n2"],
        ),
        Scenario(
            "scancel -b -s USR1",
            lambda cluster, job: cluster.run("scancel", "-b", "-s", "USR1", job),
            ["--nodelist=n1,n2"],
        ),
    )
}


def submit(cluster: Cluster, scenario: Scenario) -> None:
    command = [
        *(sys.executable, "-c", "from kempnerforge.cli.app import main; main()", "submit"),
        *(
            str(scenario.run.config),
            "--nodes",
            "2",
            "--time",
            scenario.time,
            "--gpus-per-node",
            scenario.gpus,
        ),
        *("--script", str(TESTS / "slow_train.py"), "--", *scenario.options),
    ]
    done = subprocess.run(
        command, env=cluster.environ, cwd=scenario.run.base, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    scenario.job = done.stdout.split()[1].rstrip(":")


def wait_until(condition: Callable[[], bool], what: str, deadline: float, log: Callable[[], str]) -> None:
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not in time\n{log()}"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


@pytest.fixture(scope="module")
def uninterrupted(launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = make_run(tmp_path_factory.mktemp("uninterrupted"), corpus, **SETTINGS)
    launcher.finish(run, ranks=2)
    return run


@pytest.fixture(scope="module")
def scenarios(
    cluster: Cluster, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Scenario]:
    """All scenarios, started together, each with what happens to it done as soon as it trains."""
    deadline = time.monotonic() + TIMEOUT_S
    for one in SCENARIOS.values():
        one.run = make_run(tmp_path_factory.mktemp(one.name.replace(" ", "_")), corpus, **SETTINGS)
        submit(cluster, one)
    for one in SCENARIOS.values():
        wait_until(
            lambda one=one: len(one.run.rows()) > 2, f"{one.name} trains", deadline, lambda one=one: one.log
        )
        one.happens(cluster, one.job)
    # Here, not in the tests: what SLURM starts during a test would count as left behind by it.
    wait_until(
        lambda: sum(has_ended(cluster, one) for one in SCENARIOS.values()) == len(SCENARIOS),
        "all jobs end",
        deadline,
        lambda: "".join(one.log for one in SCENARIOS.values() if cluster.state(one.job) not in ENDED),
    )
    return SCENARIOS


def has_ended(cluster: Cluster, one: Scenario) -> bool:
    facts = cluster.facts(one.job)
    if one.happens is near_the_limit and facts["JobState"] == "PENDING" and facts["TimeLimit"] != "00:10:00":
        # Moving the end made the limit shorter, for the next start too.
        cluster.run("scontrol", "update", f"JobId={one.job}", "TimeLimit=10")
    return facts["JobState"] in ENDED


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_job_that_is_stopped_is_saved_and_goes_on_exactly_when_it_should(
    cluster: Cluster, scenarios: dict[str, Scenario], uninterrupted: Run, name: str
) -> None:
    one = scenarios[name]
    facts = cluster.facts(one.job)
    receipts = one.run.receipts()
    assert int(facts["Restarts"]) == (1 if one.requeued else 0), one.log
    assert len(receipts) == 1 + one.requeued, one.log
    if not one.requeued:
        assert facts["JobState"] == "CANCELLED"
        last = one.run.record["last_exit"]
        assert last["status"] == 75
        assert one.run.sound() == [last["step"]]
        return
    assert facts["JobState"] == "COMPLETED", one.log
    # No save was due: the step that the second attempt began at is the one that stopping committed.
    assert 0 < receipts[1]["step"] < STEPS
    assert receipts[1]["lost_steps"] == 0
    assert one.run.counting() == uninterrupted.counting()
    assert tensor_digests(one.run.step_folder(STEPS)) == tensor_digests(uninterrupted.step_folder(STEPS))
