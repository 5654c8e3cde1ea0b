"""Real jobs on a real SLURM: stopped in its ways, saved, requeued when they should be, and bitwise.

All of them run at the same time in one private cluster, because most of each is waiting.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.run_files import tensor_digests
from support.runs import Launcher, Run, make_run
from support.slurm_cluster import GRACE_S, KILL_WAIT_S, Cluster, missing_programs
from support.slurm_jobs import SETTINGS, STEPS, Array, Job, SweepJob, kill_rank, near_the_limit, run_all
from support.wandb_server import FAKE_KEY, WandbServer, fragments, history, records

from kempnerforge.slurm.kill_grace import BEFORE_KILL_S

pytest_plugins = ["support.run_fixtures"]
pytestmark = pytest.mark.timeout(1200)

REQUIRED = "KEMPNERFORGE_TEST_SLURM"
"""Set by ``.ci/run``: there a missing SLURM is a failure."""
if (_missing := missing_programs()) and not os.environ.get(REQUIRED):
    pytest.skip(f"SLURM cannot be started here: no {', '.join(_missing)}", allow_module_level=True)

WANDB = {"metrics.enable_wandb": True, "metrics.wandb_project": "proj"}
TWO = ["--nodelist=n1,n2"]


def preempt(cluster: Cluster, _job: Job) -> None:
    """A job that needs all GPUs of two nodes, of which two jobs of lower partitions have some."""
    cluster.run(
        *("sbatch", "--partition=high", "--nodelist=n1,n2", "-N2", "--gpus-per-node=4"),
        *("-o/dev/null", "--wrap=sleep 1"),
    )


def node_down(cluster: Cluster, _job: Job) -> None:
    cluster.run("scontrol", "update", "NodeName=n3", "State=DOWN", "Reason=test")


def node_up(cluster: Cluster) -> None:
    """Not earlier: while the old step still ends on it, it lets the next attempt start but create no step."""
    # Refused when slurmd has registered meanwhile, which brings the node back too.
    cluster.run("scontrol", "update", "NodeName=n3", "State=RESUME", check=False)


def scancel(*options: str) -> Job:
    """A job that is sent a signal by ``scancel``, on a node that does not go down."""
    name = " ".join(("scancel", *options))
    return Job(
        name,
        ["--exclude=n3"],
        lambda cluster, job: cluster.run("scancel", *options, job.id),
        requeued=bool(options),
    )


JOBS = [
    Job("without grace", ["--partition=low", *TWO], nodes=2, gpus=1),
    Job("with grace", ["--partition=low_with_grace", *TWO], preempt, nodes=2, gpus=1),
    Job("time limit", TWO, near_the_limit, nodes=2),
    Job("node down", ["--nodelist=n1,n3"], node_down, nodes=2, then=node_up),
    Job(
        "scontrol requeue", ["--exclude=n3"], lambda cluster, job: cluster.run("scontrol", "requeue", job.id)
    ),
    scancel(),
    scancel("-s", "USR1"),
    Job(
        "scancel -b -s USR1",
        TWO,
        lambda cluster, job: cluster.run("scancel", "-b", "-s", "USR1", job.id),
        nodes=2,
    ),
    ONLINE := scancel("-s", "TERM"),
    scancel("-b", "-s", "TERM"),
]
ONLINE.settings |= WANDB


def has_step(cluster: Cluster, job: Job) -> bool:
    """Whether srun has started the launcher, which ``slow_launcher`` makes wait before it handles signals."""
    return f"StepId={job.id}.0" in cluster.run("scontrol", "show", "step", f"{job.id}.0", check=False)


def prepares_data(_cluster: Cluster, job: Job) -> bool:
    return "data: scanning" in job.log


AT_THE_START = scancel("-b", "-s", "USR1")
AT_THE_START.name, AT_THE_START.when = "at the start", has_step
SLOW = Path(__file__).parents[1] / "support/slow_launcher"
AT_THE_START.environ["PYTHONPATH"] = f"{SLOW}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
IN_DATA = scancel("-b", "-s", "USR1")
IN_DATA.name, IN_DATA.when = "in data", prepares_data
IN_DATA.environ["KEMPNERFORGE_TEST_SLOW_DATA"] = "1"
FULL = scancel("-f", "-s", "TERM")
FULL.settings["checkpoint.interval"] = 2

ARRAY = Array(
    "array",
    ["--exclude=n3"],
    lambda cluster, job: cluster.run("scancel", "-b", "-s", "USR1", f"{job.id}_1"),
    settings=WANDB,
)
FIRST = Job(
    "chain", ["--exclude=n3", "--no-requeue"], near_the_limit, requeued=False, settings={"run.name": "chain"}
)
SECOND = Job("second", ["--no-requeue", "--dependency=afterany:JOB"], after=FIRST)
THIRD = Job("third", ["--no-requeue", "--dependency=singleton"], after=SECOND)
for _job in (SECOND, THIRD):
    _job.environ["KEMPNERFORGE_TEST_FAST"] = "1"
FAULTY = Job(
    "faulty node",
    ["--exclude=n3"],
    settings={"checkpoint.interval": 5},
    environ={"KEMPNERFORGE_TEST_FAULT_AT": "3"},
)
KILLED = Job(
    "rank killed",
    TWO,
    lambda _cluster, job: kill_rank(job, 1),
    requeued=False,
    nodes=2,
    settings={"checkpoint.interval": 2},
)
SWEEP = SweepJob(
    "sweep",
    ["--exclude=n3"],
    arguments=["--sweep", f"train.max_steps=[{STEPS // 2},{STEPS}]"],
    environ={"KEMPNERFORGE_TEST_FAST": "1"},
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


@pytest.fixture(scope="module")
def wandb_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WandbServer]:
    with WandbServer() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        home = tmp_path_factory.mktemp("home")
        host = server.url.removeprefix("http://")
        (home / ".netrc").write_text(f"machine {host} login user password {FAKE_KEY}\n")
        (home / ".netrc").chmod(0o600)
        ONLINE.environ |= {"HOME": str(home), "WANDB_BASE_URL": server.url, "WANDB_MODE": None}
        ONLINE.environ |= {"WANDB_X_DISABLE_STATS": "true", "NETRC": None}
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def uninterrupted(
    launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Run]:
    """By the number of ranks: what a run that nothing happens to logs and ends with."""
    found = {}
    for ranks in (1, 2):
        found[ranks] = make_run(tmp_path_factory.mktemp("uninterrupted"), corpus, **SETTINGS)
        launcher.finish(found[ranks], ranks=ranks)
    return found


@pytest.fixture(scope="module", autouse=True)
def done(
    cluster: Cluster, corpus: Path, wandb_server: WandbServer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """All jobs have ended. Not in a test: what SLURM starts during one would count as left behind by it."""
    others = [AT_THE_START, IN_DATA, FULL, ARRAY, FIRST, SECOND, THIRD, FAULTY, KILLED, SWEEP]
    run_all(cluster, [*JOBS, *others], corpus, tmp_path_factory.mktemp("jobs"))


def assert_bitwise(run: Run, uninterrupted: Run) -> None:
    assert run.counting() == uninterrupted.counting()
    assert tensor_digests(run.step_folder(STEPS)) == tensor_digests(uninterrupted.step_folder(STEPS))


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_job_stopped_is_saved_and_requeued_when_due(uninterrupted: dict[int, Run], job: Job) -> None:
    """A job that is stopped is saved, and continues exactly when it should."""
    receipts = job.run.receipts()
    assert job.restarts == (1 if job.requeued else 0), job.log
    assert len(receipts) == 1 + job.requeued, job.log
    if not job.requeued:
        assert job.facts["JobState"] == "CANCELLED"
        last = job.run.record["last_exit"]
        assert last["status"] == 75
        assert job.run.sound() == [last["step"]]
        return
    assert job.facts["JobState"] == "COMPLETED", job.log
    # No save was due: the step that the second attempt began at is the one that stopping committed.
    assert 0 < receipts[1]["step"] < STEPS
    assert receipts[1]["lost_steps"] == 0
    assert_bitwise(job.run, uninterrupted[job.nodes])


@pytest.mark.parametrize(
    ("job", "why"),
    [
        # Before the launcher handles signals, USR1 ends it: that the shell was signalled is in its file.
        (AT_THE_START, "a stop was requested (SIGUSR1)"),
        # Nobody looks for the file while data is prepared: the signal itself breaks that off.
        (IN_DATA, "the run is not finished"),
    ],
    ids=["at the start", "in data"],
)
def test_job_stopped_before_training_is_requeued(uninterrupted: dict[int, Run], job: Job, why: str) -> None:
    assert (job.restarts, job.facts["JobState"]) == (1, "COMPLETED"), job.log
    assert f"requeue: yes: {why}" in job.log
    assert_bitwise(job.run, uninterrupted[1])


def test_job_shutdown_timeout_follows_partition_grace() -> None:
    timeouts = {"with grace": GRACE_S - BEFORE_KILL_S, "time limit": KILL_WAIT_S - BEFORE_KILL_S}
    for job in JOBS:
        if job.name in timeouts:
            note = (job.run.folder / "slurm" / f"{job.id}.0.txt").read_text()
            assert f"--train.shutdown_timeout_s={timeouts[job.name]}\n" in note


def test_job_term_to_srun_kills_and_resumes_newest_step(
    uninterrupted: dict[int, Run],
) -> None:
    # While SLURM ends a job, srun's wish to kill is not heard; sent to a running job, TERM makes it kill.
    assert "srun: forcing job termination" in FULL.log
    assert (FULL.restarts, FULL.facts["JobState"]) == (1, "COMPLETED"), FULL.log
    first, second = FULL.run.receipts()
    assert (first["step"], second["step"] % 2) == (0, 0)
    assert second["step"] > 0
    assert_bitwise(FULL.run, uninterrupted[1])


def test_job_array_requeues_only_stopped_task(
    uninterrupted: dict[int, Run],
) -> None:
    """One task of the array is requeued with its own run, and the other is untouched."""
    # The plain id of this task is that of the whole array: by it, SLURM would requeue both.
    assert ARRAY.facts["JobId"] == ARRAY.id
    assert (ARRAY.restarts, ARRAY.facts["JobState"]) == (1, "COMPLETED"), ARRAY.log
    assert (ARRAY.other_facts["Restarts"], ARRAY.other_facts["JobState"]) == ("0", "COMPLETED"), ARRAY.log
    assert [receipt["step"] for receipt in ARRAY.other.receipts()] == [0]
    began = [receipt["step"] for receipt in ARRAY.run.receipts()]
    assert len(began) == 2
    assert 0 < began[1] < STEPS
    assert ARRAY.run.record["run_id"] != ARRAY.other.record["run_id"]
    for run in (ARRAY.run, ARRAY.other):
        assert_bitwise(run, uninterrupted[1])


def test_wandb_offline_requeued_job_is_one_run() -> None:
    run = ARRAY.run
    first, second = fragments(run.folder)
    ids = {record["run"]["run_id"] for one in (first, second) for record in records(one) if "run" in record}
    assert ids == {run.record["run_id"]}
    began = run.receipts()[1]["step"]
    steps = [sorted(history(one)) for one in (first, second)]
    assert set(range(1, began + 1)) <= set(steps[0])
    assert set(range(began + 1, STEPS + 1)) <= set(steps[1])
    losses = {
        step: row["train/loss"]
        for one in (first, second)
        for step, row in history(one).items()
        if "train/loss" in row
    }
    assert losses == {step: row["train/loss"] for step, row in run.counting().items()}


def test_wandb_online_requeued_job_is_one_run(wandb_server: WandbServer) -> None:
    rows = [row for row in wandb_server.history if "train/loss" in row]
    assert [row["_step"] for row in rows] == list(range(1, STEPS + 1)), ONLINE.log
    counting = ONLINE.run.counting()
    assert [row["train/loss"] for row in rows] == [counting[row["_step"]]["train/loss"] for row in rows]
    assert {row["attempt"] for row in rows} == {1, 2}
    assert set(wandb_server.run_names) == {ONLINE.run.record["run_id"]}
    config = wandb_server.configs[-1]
    places = [config[f"place/attempt_000{attempt}"]["value"] for attempt in (1, 2)]
    assert [place["slurm_job_id"] for place in places] == [ONLINE.id] * 2
    assert [place["slurm_restart_count"] for place in places] == [0, 1]


def test_job_chain_continues_and_ends_when_finished(
    uninterrupted: dict[int, Run],
) -> None:
    """A job continues behind one that ran out of time, and does no harm behind a finished one."""
    run = FIRST.run
    assert [job.restarts for job in (FIRST, SECOND, THIRD)] == [0, 0, 0]
    assert (FIRST.facts["JobState"], FIRST.facts["ExitCode"]) == ("FAILED", "75:0"), FIRST.log
    for job in (SECOND, THIRD):
        assert (job.facts["JobState"], job.facts["ExitCode"]) == ("COMPLETED", "0:0"), job.log
    began = [receipt["step"] for receipt in run.receipts()]
    assert 0 < began[1] < STEPS
    assert began == [0, began[1], STEPS]
    assert [receipt["lost_steps"] for receipt in run.receipts()] == [0, 0, 0]
    assert run.sound() == [STEPS, began[1]]
    assert_bitwise(run, uninterrupted[1])


def test_job_requeue_excludes_node_of_recorded_fault(uninterrupted: dict[int, Run]) -> None:
    run = FAULTY.run
    assert (FAULTY.restarts, FAULTY.facts["JobState"]) == (1, "COMPLETED"), FAULTY.log
    faults = list((run.folder / "faults").glob("attempt_*"))
    bad = {"n1": "n2", "n2": "n1"}[FAULTY.facts["NodeList"]]
    # Restarted in place once. A third fault on this node would have blocked the run.
    assert len(faults) == 2
    for fault in faults:
        assert f'"host": "{bad}"' in fault.read_text()
        assert "this node is bad" in fault.read_text()
    assert "all faults since the last commit name one node" in FAULTY.log
    assert FAULTY.facts["ExcNodeList"] in (f"{bad},n3", f"n[{bad[1]}-3]", f"n[{bad[1]},3]")
    assert [receipt["step"] for receipt in run.receipts()] == [0, 0, 0]
    assert_bitwise(run, uninterrupted[1])


def test_job_rank_killed_restarts_in_place_on_all_nodes(uninterrupted: dict[int, Run]) -> None:
    """A fault of a rank does not go through the queue."""
    assert (KILLED.restarts, KILLED.facts["JobState"]) == (0, "COMPLETED"), KILLED.log
    assert KILLED.log.count("rank 1 was ended by SIGKILL. Restarting all ranks from step") == 1
    began = [receipt["step"] for receipt in KILLED.run.receipts()]
    assert began[0] == 0
    assert 0 < began[1] < STEPS
    assert len(began) == 2
    assert_bitwise(KILLED.run, uninterrupted[2])


def test_job_sweep_runs_every_cell_with_its_values(uninterrupted: dict[int, Run]) -> None:
    assert [SWEEP.other_facts["JobState"], SWEEP.facts["JobState"]] == ["COMPLETED"] * 2, SWEEP.log
    assert [run.record["last_exit"]["step"] for run in (SWEEP.other, SWEEP.run)] == [STEPS // 2, STEPS]
    assert_bitwise(SWEEP.run, uninterrupted[1])
