"""Parts of the launcher that need no process: what follows an end, this node's resources, how nodes meet."""

from __future__ import annotations

import contextlib
import selectors
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kempnerforge.goodput.faults import FaultRecord
from kempnerforge.goodput.history import AttemptHistory
from kempnerforge.launch import node_link, supervisor
from kempnerforge.launch.node_link import Link, Meeting, NodesError, accept_nodes, join_head
from kempnerforge.launch.node_resources import count_cores, count_gpus, set_threads, threads_per_rank
from kempnerforge.launch.restart_policy import RestartBudget, outcome
from kempnerforge.launch.run_progress import blames_one_node, recorded_cause
from kempnerforge.launch.supervisor import KILL_MARGIN_S, Node


@pytest.mark.parametrize(
    ("statuses", "first_failed", "status", "is_fault"),
    [
        ({0: 0, 1: 0}, None, 0, False),
        ({0: 75, 1: 75}, None, 75, False),
        ({0: 76, 1: 76}, None, 76, False),
        ({0: 1, 1: 2}, 0, 2, False),  # rank 1 cannot read the data, and rank 0 loses it
        ({0: 75, 1: -11}, 1, 75, False),  # the step is committed
        ({0: 1, 1: 3}, 1, 3, True),
        ({0: 1, 1: -9}, 1, 137, True),
        ({0: 0, 1: -6}, 1, 134, True),
    ],
)
def test_launch_outcome_table(
    statuses: dict[int, int], first_failed: int | None, status: int, is_fault: bool
) -> None:
    ended = outcome(statuses, first_failed=first_failed)
    assert (ended.status, ended.is_fault) == (status, is_fault)


def test_launch_restarts_in_a_row_are_counted_since_last_commit() -> None:
    budget = RestartBudget(2, newest_step=40)
    assert [budget.take(40), budget.take(40), budget.take(40)] == [True, True, False]
    assert budget.take(50)
    assert budget.in_a_row == 1
    # Steps that were rolled back and are committed again are not new.
    assert [budget.take(45), budget.take(50)] == [True, False]
    assert not RestartBudget(0, newest_step=0).take(10)


def attempt(number: int, host: str | None) -> AttemptHistory:
    made = AttemptHistory(number, end={"kind": "lost", "reason": "", "step": 3})
    if host is not None:
        made.cause = FaultRecord(number, 1, host, 0.0, "ValueError: a\nb", by_peer=False, path="f.txt")
    return made


@pytest.mark.parametrize(
    ("hosts", "limit", "expected"),
    [
        (["n1", "n1"], 3, True),
        (["n1"], 3, False),
        (["n1", "n2"], 3, False),
        (["n1", "n1", "n1"], 3, False),
        (["n1"], 2, True),
        (["n1", None, "n1"], 3, True),  # killed: not the run's own fault
        ([], 1, False),
        (["n1"], 0, False),
    ],
)
def test_launch_one_faulty_node_is_left_to_requeue(
    hosts: list[str | None], limit: int, expected: bool
) -> None:
    attempts = [attempt(number, host) for number, host in enumerate(hosts, start=1)]
    assert blames_one_node(attempts, newest_step=0, limit=limit) is expected


def test_launch_cause_is_one_line_of_this_start() -> None:
    attempts = [attempt(1, "n1"), attempt(2, "n2")]
    assert recorded_cause(attempts, after_attempt=1) == "rank 1 on n2: ValueError: a"
    assert recorded_cause(attempts, after_attempt=2) == ""
    assert recorded_cause([attempt(1, None)], after_attempt=0) == ""


# The node


@pytest.mark.parametrize(
    ("visible", "count"),
    [("0,1,2", 3), ("", 0), ("-1", 0), ("GPU-1a2b, MIG-3c", 2), ("0,-1,2", 1), (None, 2)],
)
def test_launch_gpus_counted_without_cuda(tmp_path: Path, visible: str | None, count: int) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert count_gpus(environ, tmp_path) == count


V1 = "cpu/job/cpu.cfs_"


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/job/step\n", {"job/cpu.max": "250000 100000", "job/step/cpu.max": "max 100000"}, 2),
        ("0::/job\n", {"job/cpu.max": "50000 100000"}, 1),
        ("0::/of/the/host\n", {"cpu.max": "300000 100000"}, 3),
        (
            "4:cpu,cpuacct:/job\n",
            {"cpu/job/cpu.cfs_quota_us": "400000", "cpu/job/cpu.cfs_period_us": "100000"},
            4,
        ),
        ("0::/job\n", {"job/cpu.max": "max 100000"}, 64),
        ("0::/job\n", {"job/cpu.max": "nonsense"}, 64),
    ],
)
def test_launch_cores_follow_cgroup_quota(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own: str, files: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: range(64))
    (tmp_path / "own").write_text(own)
    for name, content in files.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    assert count_cores(tmp_path / "fs", tmp_path / "own") == cores
    assert count_cores(tmp_path / "fs", tmp_path / "absent") == 64


@pytest.mark.parametrize(
    ("cores", "ranks", "threads"), [(2, 1, 1), (2, 2, 1), (1, 4, 1), (16, 4, 3), (64, 8, 7), (64, 1, 8)]
)
def test_launch_threads_leave_a_core_per_rank(cores: int, ranks: int, threads: int) -> None:
    assert threads_per_rank(cores, ranks) == threads


def test_launch_threads_of_the_user_are_kept() -> None:
    environ: dict[str, str] = {}
    assert set_threads(environ, 1000) == (
        f"1 thread per process (1000 processes on {count_cores()} CPU cores); "
        "set OMP_NUM_THREADS to change it"
    )
    assert environ == {"OMP_NUM_THREADS": "1"}
    environ = {"OMP_NUM_THREADS": "16"}
    assert set_threads(environ, 2) == ""
    assert environ == {"OMP_NUM_THREADS": "16"}


class Ranks:
    """Ranks that never end by themselves."""

    are_running = True
    statuses: dict[int, int]

    def __init__(self) -> None:
        self.statuses = {}
        self.sent: list[int] = []

    def start(self, **_place: Any) -> None:
        self.sent.append(0)

    def send(self, number: int) -> None:
        self.sent.append(number)

    def poll(self) -> list[int]:
        return []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_launch_ranks_that_do_not_stop_are_killed(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    now = 100.0
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: now)
    ranks: Any = Ranks()
    node = Node(ranks, shutdown_timeout_s=25.0)
    reports: list[tuple[str, Any]] = []
    node.report = lambda kind, value: reports.append((kind, value))
    node.start(restart_count=0, address="n1", port=5)
    ranks.sent.clear()
    node.on_signal(number)
    now += 25.0 + KILL_MARGIN_S - 0.1
    node.tick()
    assert ranks.sent == [number]
    now += 0.2
    node.tick()
    is_timed = number == signal.SIGTERM  # the others are early: a warning, and a request to save
    assert (ranks.sent[1:] == [signal.SIGKILL]) is is_timed
    kinds = [kind for kind, _ in reports]
    assert kinds == {signal.SIGTERM: ["stop", "timed_out"], signal.SIGUSR1: ["stop"]}.get(number, [])


def test_launch_signal_before_the_start_reaches_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher waits for those of other nodes, perhaps for minutes."""
    now = 100.0
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: now)
    ranks: Any = Ranks()
    node = Node(ranks, shutdown_timeout_s=25.0)
    reports: list[tuple[str, Any]] = []
    node.report = lambda kind, value: reports.append((kind, value))
    node.on_signal(signal.SIGTERM)
    assert reports == [("stop", signal.SIGTERM)]
    now += 300.0
    node.start(restart_count=0, address="n1", port=5)
    node.tick()
    assert ranks.sent == [0, signal.SIGTERM]  # 0 is the start; they have the whole time to stop
    now += 25.0 + KILL_MARGIN_S
    node.tick()
    assert ranks.sent == [0, signal.SIGTERM, signal.SIGKILL]


# Several nodes


@pytest.fixture
def meeting() -> Meeting:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    return Meeting("127.0.0.1", [port], b"7.0.0.secret")


def test_launch_nodes_meet_although_a_port_is_taken(meeting: Meeting) -> None:
    with socket.create_server(("", 0)) as taken:
        there = Meeting(meeting.address, [taken.getsockname()[1], *meeting.ports], meeting.key)
        found: dict[int, Link] = {}
        head = threading.Thread(target=lambda: found.update(accept_nodes(there, 3, 4)))
        head.start()
    # Here nobody listens there any more. A program that does not answer costs a few seconds.
    links = [join_head(there, node, 4) for node in (2, 1)]
    head.join()
    assert sorted(found) == [1, 2]
    messages: list[Any] = []
    with selectors.DefaultSelector() as selector:
        found[1].send("start", {"port": 5})
        found[1].send("exit", 3)
        found[1].close()
        links[1].watch(selector, messages.append, lambda: messages.append("closed"))
        while "closed" not in messages:
            for key, _ in selector.select(10):
                key.data()
    assert messages == [["start", {"port": 5}], ["exit", 3], "closed"]
    for link in (*links, *found.values()):
        link.close()


def _connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        return ours, server.accept()[0]


@pytest.mark.parametrize("added", ["repeated", "forged", "nothing"])
def test_launch_relay_cannot_add_messages_to_a_link(added: str) -> None:
    """Another user may listen at the port, and pass on what the launchers write until both trust it."""
    (to_node, node_end), (to_head, head_end) = _connected(), _connected()
    with ThreadPoolExecutor() as threads:
        node = threads.submit(Link, node_end, b"secret", is_head=False)
        head = threads.submit(Link, head_end, b"secret", is_head=True)
        to_head.sendall(to_node.recv(4096))
        to_node.sendall(to_head.recv(4096))
    head.result().send("welcome")
    first = to_head.recv(4096)
    head.result().send("start", {"port": 5})
    line = to_head.recv(4096)
    to_node.sendall(first + line + {"repeated": line, "forged": b'0 ["start", {}]\n', "nothing": b""}[added])
    assert node.result().first_message() == ["welcome"]
    messages: list[Any] = []
    with selectors.DefaultSelector() as selector:  # what came with the first message is delivered too
        node.result().watch(selector, messages.append, lambda: messages.append("closed"))
        node.result().close()
    assert messages == [["start", {"port": 5}], *([] if added == "nothing" else ["closed"])]
    head.result().close()
    to_node.close()
    to_head.close()


def test_launch_head_without_the_key_is_not_joined(monkeypatch: pytest.MonkeyPatch, meeting: Meeting) -> None:
    monkeypatch.setattr(node_link, "JOIN_TIMEOUT_S", 0.3)
    with socket.create_server(("", meeting.ports[0])) as server:

        def welcome() -> None:
            connection = server.accept()[0]
            server.close()
            link = Link(connection, b"7.0.0.", is_head=True)
            link.send("welcome")
            link.send("start", {"address": "203.0.113.1"})
            link.close()

        other_user = threading.Thread(target=welcome)
        other_user.start()
        with pytest.raises(NodesError, match="the launcher of node 0 did not answer"):
            join_head(meeting, 1, 4)
        other_user.join()


def test_launch_slow_connection_delays_no_deadline(monkeypatch: pytest.MonkeyPatch, meeting: Meeting) -> None:
    monkeypatch.setattr(node_link, "JOIN_TIMEOUT_S", 0.5)
    monkeypatch.setattr(node_link, "_ANSWER_TIMEOUT_S", 0.5)
    errors: list[BaseException] = []
    head = threading.Thread(target=lambda: errors.append(_error_of(meeting)))
    head.start()
    connection = _connect_soon(meeting)
    for _ in range(500):
        if not head.is_alive():
            break
        with contextlib.suppress(OSError):  # closed by the head
            connection.sendall(b"x")
        head.join(0.02)
    connection.close()
    assert "nodes 1 did not connect" in str(errors), "the head still waits for the rest of the line"


def _error_of(meeting: Meeting) -> BaseException:
    with pytest.raises(NodesError) as raised:
        accept_nodes(meeting, 2, 4)
    return raised.value


def _connect_soon(meeting: Meeting) -> socket.socket:
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection((meeting.address, meeting.ports[0]))


def test_launch_nodes_with_other_numbers_of_ranks_are_refused(meeting: Meeting) -> None:
    errors: list[BaseException] = []
    head = threading.Thread(target=lambda: errors.append(_error_of(meeting)))
    head.start()
    with pytest.raises(NodesError, match="node 1 starts 8 processes, and node 0 starts 4"):
        join_head(meeting, 1, 8)
    head.join()
    assert len(errors) == 1


def test_launch_missing_node_is_named(monkeypatch: pytest.MonkeyPatch, meeting: Meeting) -> None:
    monkeypatch.setattr(node_link, "JOIN_TIMEOUT_S", 0.05)
    with pytest.raises(NodesError, match="nodes 1, 2 did not connect"):
        accept_nodes(meeting, 3, 4)
    with pytest.raises(NodesError, match="the launcher of node 0 did not answer"):
        join_head(meeting, 1, 4)
