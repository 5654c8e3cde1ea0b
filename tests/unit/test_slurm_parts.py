"""Parts that need no SLURM: node lists, the decision to requeue, the script, what ``submit`` refuses."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from kempnerforge import hostlist
from kempnerforge.cli.slurm import lost_in_a_row, nodes_of
from kempnerforge.goodput.history import derive
from kempnerforge.slurm import script
from kempnerforge.slurm.attempt_info import describe_attempt
from kempnerforge.slurm.job import (
    SlurmJob,
    clean_environment,
    leaves_enough,
    node_name,
    parse_facts,
    parse_lost_nodes,
    this_job,
)
from kempnerforge.slurm.kill_grace import Grace, parse_grace
from kempnerforge.slurm.requeue_policy import decide
from kempnerforge.slurm.script import array_faults, option_faults, option_value, parse_time_s, stop_before_s


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("", []),
        ("login1", ["login1"]),
        ("gpu[07-09,12],login1", ["gpu07", "gpu08", "gpu09", "gpu12", "login1"]),
        ("a[1-2]b[08,10]", ["a1b08", "a1b10", "a2b08", "a2b10"]),
        ("n[98-101]", ["n98", "n99", "n100", "n101"]),
        ("holygpu8a[101]", ["holygpu8a101"]),
        ("a-b.c,[3-4]x", ["a-b.c", "3x", "4x"]),
    ],
)
def test_hostlist_table_expands(text: str, hosts: list[str]) -> None:
    assert hostlist.expand(text) == hosts


@pytest.mark.parametrize("text", ["a[", "a[1-", "a[]", "a[2-1]", "a[x]", "a,,b", "a]", ","])
def test_hostlist_invalid_text_refused(text: str) -> None:
    with pytest.raises(ValueError, match="node list"):
        hostlist.expand(text)


RUNNING = {"job_state": "RUNNING"}


@pytest.mark.parametrize(
    ("known", "requeue", "status"),
    [
        (RUNNING | {"status": 75, "reason": "stopped by SIGTERM at step 3"}, True, 75),
        (RUNNING | {"status": 75, "reason": "stopped by SIGUSR1 at step 3"}, True, 75),
        (RUNNING | {"status": 75, "reason": "stopped by SIGINT at step 3"}, False, 75),
        (RUNNING | {"status": 75, "reason": "stopped by stop.request at step 3"}, False, 75),
        (RUNNING | {"status": 75, "reason": "stopped by stop.request (SIGUSR1)"}, True, 75),
        ({"job_state": "CANCELLED", "status": 75, "stop_requested_by": "SIGTERM"}, False, 75),
        ({"job_state": "COMPLETING", "status": 75, "stop_requested_by": "SIGTERM"}, False, 75),
        ({"job_state": "", "status": None}, False, 1),
        (RUNNING | {"status": 0}, False, 0),
        (RUNNING | {"status": 0, "stop_requested_by": "SIGUSR1"}, False, 0),
        (RUNNING | {"status": 2, "stop_requested_by": "SIGUSR1"}, False, 2),
        (RUNNING | {"status": 76, "lost_nodes": ["n1"]}, False, 76),
        (RUNNING | {"status": None}, False, 1),
        (RUNNING | {"status": 1, "reason": "RuntimeError"}, False, 1),
        (RUNNING | {"status": None, "stop_requested_by": "preempted"}, True, 1),
        (RUNNING | {"status": None, "lost_nodes": ["n2"]}, True, 1),
        (RUNNING | {"status": 1, "lost_nodes": ["n2"]}, True, 1),
        (RUNNING | {"status": 1, "faulty_nodes": ["n2"]}, True, 1),
        (RUNNING | {"status": None, "lost_in_a_row": 0}, True, 1),  # it had committed a step
        (RUNNING | {"status": 1, "lost_in_a_row": 2}, True, 1),
        (RUNNING | {"status": 1, "lost_in_a_row": 3}, False, 1),
        (RUNNING | {"status": 2, "lost_in_a_row": 0}, False, 2),
        (RUNNING | {"status": 75, "reason": "deadline", "may_requeue": False}, False, 75),
        (RUNNING | {"status": 1, "faulty_nodes": ["n2"], "may_requeue": False}, False, 1),
        (RUNNING | {"status": 0, "may_requeue": False}, False, 0),
    ],
)
def test_slurm_requeue_table_matches(known: dict[str, Any], requeue: bool, status: int) -> None:
    decision = decide(**known)
    assert (decision.requeue, decision.status) == (requeue, status)
    assert decision.why
    assert decision.exclude == (("n2",) if requeue and "n2" in str(known) else ())


def test_slurm_lost_nodes_parsed() -> None:
    listing = "n1 mixed\nn2 down*\nn3 idle\nn4 drained\nn5 allocated*\nn6 fail\nn2 down*\n"
    assert parse_lost_nodes(listing) == ["n2", "n5", "n6"]


NODES = "n1 mixed\nn2 idle\nn3 allocated+\nn4 drained\nn5 down*\nn6 idle*\nn1 mixed\n"


@pytest.mark.parametrize(
    ("out", "requested", "needed", "enough"),
    [
        ({"n1"}, (), 2, True),
        ({"n1"}, (), 3, False),
        ({"n1", "n4"}, (), 2, True),
        ({"n1", "n2", "n3"}, (), 1, False),
        ({"n1"}, ("n2",), 1, True),
        ({"n1"}, ("n1", "n2"), 2, False),
    ],
)
def test_slurm_exclusion_leaves_enough_nodes(
    out: set[str], requested: tuple[str, ...], needed: int, enough: bool
) -> None:
    assert leaves_enough(NODES, out, required=requested, needed=needed) is enough


def event(attempt: int, name: str, **values: Any) -> dict[str, Any]:
    return {"event": name, "attempt": attempt, "time": float(attempt), **values}


@pytest.mark.parametrize(
    ("events", "before", "count"),
    [
        ([], 0, None),
        ([event(1, "start")], 0, 1),
        ([event(1, "start")], 1, None),
        ([event(1, "start"), event(1, "commit", step=3)], 0, 0),
        ([event(1, "commit", step=3), event(2, "start"), event(3, "start")], 2, 2),
        ([event(1, "start"), event(2, "end", kind="stopped"), event(3, "end", kind="lost")], 2, 1),
        ([event(1, "end", kind="fault")], 0, None),
    ],
)
def test_slurm_lost_in_a_row_counted(events: list[dict[str, Any]], before: int, count: int | None) -> None:
    assert lost_in_a_row(derive(events, []), before=before) == count


def test_slurm_hosts_found_among_job_nodes() -> None:
    assert nodes_of({"n2.cluster.org", "n10"}, ["n1", "n2"]) == ["n2"]


def test_slurm_facts_without_value_left_out() -> None:
    line = "JobId=1 Name=a=b PreemptTime=2026-11-25T12:25:24 SuspendTime=None ExcNodeList=(null) Requeue=0 x"
    known = {"JobId": "1", "Name": "a=b", "PreemptTime": "2026-11-25T12:25:24", "Requeue": "0"}
    assert parse_facts(line) == known


def test_slurm_this_job_from_environment() -> None:
    assert this_job({}) is None
    environ = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    assert this_job(environ) == SlurmJob("7", 0, ("n1", "n2"))
    array = environ | {
        "SLURM_RESTART_COUNT": "3",
        "SLURM_ARRAY_JOB_ID": "6",
        "SLURM_ARRAY_TASK_ID": "1",
    }
    found = this_job(array)
    assert found == SlurmJob("7", 3, ("n1", "n2"), "6", "1")
    assert found is not None
    assert (found.attempt_name, found.handle) == ("7.3", "6_1")


def test_slurm_node_name_as_slurm_calls_it() -> None:
    assert node_name({"SLURMD_NODENAME": "gpu07"}) == "gpu07"
    assert node_name({}) == socket.gethostname()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("24:00:00", 86400),
        ("2-12", 216000),
        ("1-0:30", 88200),
        ("1-00:00:05", 86405),
        ("soon", None),
        ("", None),
    ],
)
def test_slurm_time_limits_parsed(text: str, seconds: int | None) -> None:
    assert parse_time_s(text) == seconds


def test_slurm_short_job_not_signalled_at_start() -> None:
    assert (stop_before_s("24:00:00"), stop_before_s("1:00")) == (120, 15)


def test_slurm_options_bypassing_check_refused() -> None:
    faults = option_faults("soon", ["-N4", "--time=3", "-p", "gpu", "--qos=low", "--train.seed=3", "--a\nb"])
    assert [fault.key for fault in faults] == [
        "--time",
        "-N4",
        "--time=3",
        "--train.seed=3",
        repr("--a\nb"),
    ]


@pytest.mark.parametrize(
    ("options", "value"),
    [
        (["--qos=low"], None),
        (["--partition=gpu,low"], "gpu,low"),
        (["--qos=low", "--partition", "gpu"], "gpu"),
        (["-p", "gpu", "-x", "n1"], "gpu"),
        (["-pgpu"], "gpu"),
        (["-p"], ""),
        (["--prefer=x", "--partitions=x"], None),
    ],
)
def test_slurm_sbatch_option_value_found(options: list[str], value: str | None) -> None:
    assert option_value(options, "--partition", "-p") == value


@pytest.mark.parametrize(
    ("options", "is_shared", "refused"),
    [
        (["--array=0-3"], True, True),
        (["-a", "1,3"], True, True),
        (["--array=0-3"], False, False),
        (["--array=1-9%1"], True, False),
        (["--array=1-9%2"], True, True),
        (["--array=3"], True, False),
        ([], True, False),
    ],
)
def test_slurm_array_sharing_one_run_refused(options: list[str], is_shared: bool, refused: bool) -> None:
    assert bool(array_faults(options, "runs/x", is_shared=is_shared)) is refused


CONFIG = "Configuration data\nKillOnBadExit           = 0\nKillWait                = 45 sec\n"
PARTITIONS = """\
PartitionName=main Default=YES GraceTime=0 PreemptMode=OFF
PartitionName=low Default=NO GraceTime=300 PreemptMode=REQUEUE
PartitionName=off Default=NO GraceTime=300 PreemptMode=OFF
PartitionName=short Default=NO GraceTime=20 PreemptMode=REQUEUE
"""


@pytest.mark.parametrize(
    ("partition", "kill_wait_s", "grace_s", "timeout_s"),
    [
        ("", 45, 0, 40),
        ("low", 45, 300, 295),
        ("off", 45, 0, 40),
        ("short", 45, 20, 40),
        ("low,main", 45, 0, 40),
    ],
)
def test_slurm_grace_of_partition_parsed(
    partition: str, kill_wait_s: int, grace_s: int, timeout_s: int
) -> None:
    found = parse_grace(CONFIG, PARTITIONS, partition)
    assert found == Grace(kill_wait_s, grace_s)
    assert found is not None
    assert found.shutdown_timeout_s == timeout_s


def test_slurm_grace_unknown_not_guessed() -> None:
    assert parse_grace(CONFIG, PARTITIONS, "gpu") is None
    assert parse_grace(CONFIG, "", "") is None
    assert parse_grace("", PARTITIONS, "low") is None


def test_slurm_note_hides_secrets() -> None:
    names = ["WANDB_API_KEY", "HF_TOKEN", "PGPASS", "MY_PAT", "DATABASE_URL", "HTTPS_PROXY", "SLURM_JWT", "X"]
    names.append("KEMPNERFORGE_LINK_SECRET")
    environ = {**dict.fromkeys(names, "s3cr3t"), "HOME": "/home/x"}
    text = describe_attempt(environ, command=["train.py"], config_toml="[run]\n", revision="abc\n")
    assert "s3cr3t" not in text
    assert "HOME='/home/x'" in text
    assert "DATABASE_URL=(not recorded)" in text


@pytest.mark.parametrize("folder", ["runs/50%", "runs/%j", "runs/%%x", "runs/plain"])
def test_script_percent_in_run_dir_names_the_same_log(folder: str) -> None:
    """sbatch replaces %j in the name of the log, and nothing else."""
    pattern = script.escape_pattern(folder) + "/%j.log"
    assert script.expand_pattern(pattern, {"j": "7", "x": "name"}) == f"{folder}/7.log"


def test_submit_environment_has_nothing_of_this_job() -> None:
    mine = {"PATH": "/bin", "SLURM_CONF": "/etc/slurm.conf", "SBATCH_PARTITION": "gpu", "WANDB_API_KEY": "k"}
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1", "SLURM_RESTART_COUNT": "3", "SLURMD_NODENAME": "n"}
    rank = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x"}
    assert clean_environment({**mine, **job, **rank}) == mine
