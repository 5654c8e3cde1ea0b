"""Start the ranks on all nodes, and decide what to do when they end.

One launcher runs on each node. That of node 0, the head, decides for all of them: a restart must
restart the ranks of all nodes together, with a new rendezvous. The others report to it and do what
it says. On a single node, the head has nobody to talk to.
"""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kempnerforge.errors import EXIT_FAULT, EXIT_NO_PROGRESS, EXIT_STOPPED
from kempnerforge.launch import run_progress
from kempnerforge.launch.event_loop import EventLoop
from kempnerforge.launch.node_link import Link
from kempnerforge.launch.rank_processes import RankProcesses, write_line
from kempnerforge.launch.restart_policy import RestartBudget, outcome, signal_name
from kempnerforge.printable import printable

AFTER_KILL_S, AFTER_FAULT_S = 3.0, 10.0
"""How long the other ranks may take to end by themselves, after a rank was killed, or failed. They
record their end, and finish commits. With NCCL they may not notice the loss at all."""
KILL_MARGIN_S = 10.0
"""The ranks end themselves ``train.shutdown_timeout_s`` after a signal. Later they are killed."""


def say(text: str) -> None:
    """Write a message of the launcher."""
    write_line(f"kempnerforge: {printable(text)}".encode())


class Node:
    """The ranks of this node, and what happens to them.

    Args:
        ranks: the ranks.
        shutdown_timeout_s: ``train.shutdown_timeout_s``.
    """

    def __init__(self, ranks: RankProcesses, *, shutdown_timeout_s: float) -> None:
        self.ranks = ranks
        self.report: Callable[[str, Any], None] = lambda _kind, _value: None
        """Called with the kind and the value of everything that the head must know."""
        self._kill_after_s = shutdown_timeout_s + KILL_MARGIN_S
        self._kill_at: float | None = None
        self._is_started = False
        self._early_signals: list[int] = []
        """Signals that came when no ranks were running."""

    def start(self, *, restart_count: int, address: str, port: int, store_fd: int = -1) -> None:
        """Start the ranks, and forward to them the signals that came before."""
        self._is_started = True
        self.ranks.start(restart_count=restart_count, address=address, port=port, store_fd=store_fd)
        while self._early_signals:
            self._forward(self._early_signals.pop(0))

    def kill(self) -> None:
        """Kill the ranks."""
        self.ranks.send(signal.SIGKILL)

    def on_signal(self, number: int) -> None:
        """Forward a signal to the ranks, at their start if need be, and report a request to stop."""
        if self._is_started:
            self._forward(number)
        else:
            self._early_signals.append(number)
        if number != signal.SIGUSR2:  # a request to save
            self.report("stop", number)

    def _forward(self, number: int) -> None:
        self.ranks.send(number)
        is_stop = number not in (signal.SIGUSR1, signal.SIGUSR2)  # an early warning, and a request to save
        if is_stop and self._kill_at is None:
            self._kill_at = time.monotonic() + self._kill_after_s

    def tick(self) -> None:
        """Report ranks that have ended, and kill those that do not stop in time."""
        for rank in self.ranks.poll():
            if self.ranks.statuses[rank]:
                self.report("failed", [rank, self.ranks.statuses[rank]])
        if self._is_started and not self.ranks.are_running:
            self._is_started = False
            self.report("ended", sorted(self.ranks.statuses.items()))
        if self._kill_at is not None and time.monotonic() >= self._kill_at and self.ranks.are_running:
            self._kill_at = None
            self.report("timed_out", self._kill_after_s)
            self.kill()


@dataclass(frozen=True)
class RunLimits:
    """What the head must know about the run."""

    run_dir: Path
    max_restarts: int
    """``train.max_restarts``."""
    max_faults_without_progress: int
    """``run.max_faults_without_progress``."""
    may_requeue: bool = False
    """Whether SLURM starts the run again, without a node that recorded faults."""


class Head:
    """Decides for all nodes.

    Args:
        node: the ranks of this node.
        links: node -> link to its launcher.
        limits: the limits of the run.
        address: where the ranks of all nodes reach this one.
    """

    def __init__(self, node: Node, links: Mapping[int, Link], limits: RunLimits, address: str) -> None:
        self._node = node
        node.report = self._reported
        self._links = links
        self._limits = limits
        self._address = address
        self._restart_count = -1
        self._budget = RestartBudget(limits.max_restarts, run_progress.newest_step(limits.run_dir))
        self._after_attempt = 0
        self._statuses: dict[int, int] = {}
        self._first_failed: int | None = None
        self._kill_at: float | None = None
        self._stopped_by = 0
        self._timed_out = False
        self._lost_node: int | None = None
        self._status: int | None = None

    def run(self, loop: EventLoop) -> int:
        """Start the ranks of all nodes, until the run ends. Return the exit status."""
        for number, link in self._links.items():
            link.watch(
                loop.selector,
                lambda message, number=number: self._reported(message[0], message[-1]),
                lambda number=number: self._lost(number),
            )
        self._start()
        status = loop.run(self._tick, self._node.on_signal)
        for link in self._links.values():
            link.send("exit", status)
            link.close()
        return status

    def _reported(self, kind: str, value: Any) -> None:
        if kind == "failed":
            self._failed(*value)
        elif kind == "ended":
            self._statuses.update((rank, status) for rank, status in value)
        elif kind == "stop":
            self._stopped_by = self._stopped_by or value
        elif kind == "timed_out":
            self._timed_out = True
            say(f"ranks had not stopped {value:g} s after the signal and are killed")

    def _start(self) -> None:
        attempts = run_progress.read_attempts(self._limits.run_dir)
        self._after_attempt = attempts[-1].number if attempts else 0
        self._statuses, self._first_failed, self._kill_at = {}, None, None
        self._restart_count += 1
        # The store of rank 0 takes over this socket, so nobody else can take the port meanwhile.
        with socket.create_server(("" if self._links else self._address, 0), backlog=65535) as store:
            place = {"restart_count": self._restart_count, "address": self._address}
            place["port"] = store.getsockname()[1]
            for link in self._links.values():
                link.send("start", place)
            self._node.start(**place, store_fd=store.fileno())

    def _failed(self, rank: int, status: int) -> None:
        if status in (EXIT_STOPPED, EXIT_NO_PROGRESS):
            return  # all ranks end so, each in its own time
        if self._first_failed is None:
            self._first_failed = rank
            wait_s = AFTER_KILL_S if status < 0 else AFTER_FAULT_S
            self._kill_at = time.monotonic() + wait_s

    def _lost(self, number: int) -> None:
        if self._lost_node is None:
            self._lost_node = number
            say(f"lost the connection to the launcher of node {number}, so all ranks are killed")
        self._kill_all()

    def _kill_all(self) -> None:
        self._kill_at = None
        self._node.kill()
        for link in self._links.values():
            link.send("kill", True)

    def _tick(self) -> int | None:
        self._node.tick()
        if self._kill_at is not None and time.monotonic() >= self._kill_at:
            self._kill_all()
        if self._lost_node is not None and not self._node.ranks.are_running:
            self._status = EXIT_FAULT
        elif len(self._statuses) == self._node.ranks.layout.world_size:
            self._decide()
        return self._status

    def _decide(self) -> None:
        """All ranks have ended: start them again, or set the exit status."""
        ended = outcome(self._statuses, first_failed=self._first_failed)
        if not ended.is_fault or self._timed_out:
            self._status = EXIT_STOPPED if ended.is_fault else ended.status
            return
        attempts = run_progress.read_attempts(self._limits.run_dir)
        what = run_progress.recorded_cause(attempts, after_attempt=self._after_attempt) or ended.description
        newest = run_progress.newest_step(self._limits.run_dir)
        limit = self._limits.max_faults_without_progress
        if self._stopped_by:
            say(f"{what}. Not restarted, because {signal_name(self._stopped_by)} asked for a stop")
        elif self._limits.may_requeue and run_progress.blames_one_node(
            attempts, newest_step=newest, limit=limit
        ):
            say(f"{what}. Not restarted here: all faults since the last commit name one node")
        elif self._budget.take(newest):
            where = f"from step {newest}" if newest else "from the beginning"
            count = f"{self._budget.in_a_row} of {self._budget.max_restarts} without a new commit"
            say(f"{what}. Restarting all ranks {where} (restart {count})")
            self._start()
            return
        elif not self._budget.max_restarts:
            say(f"{what}. Not restarted (train.max_restarts = 0). Run the same command to resume")
        else:
            limit = self._budget.max_restarts
            restarts = "1 restart" if limit == 1 else f"{limit} restarts in a row"
            say(
                f"{what}. Not restarted: {restarts} made no new commit (train.max_restarts). "
                "Fix the cause, then run the same command again"
            )
        self._status = ended.status


class Follower:
    """The launcher of another node than the head's: does what the head says."""

    def __init__(self, node: Node, link: Link) -> None:
        self._node = node
        node.report = link.send
        self._link = link
        self._status: int | None = None
        self._is_lost = False

    def run(self, loop: EventLoop) -> int:
        """Follow the head until it says how the run ended. Return the exit status."""
        self._link.watch(loop.selector, lambda message: self._obey(message[0], message[-1]), self._lost)
        status = loop.run(self._tick, self._node.on_signal)
        self._link.close()
        return status

    def _obey(self, kind: str, value: Any) -> None:
        if kind == "start":
            self._node.start(**value)
        elif kind == "kill":
            self._node.kill()
        elif kind == "exit":
            self._status = value

    def _lost(self) -> None:
        if self._status is None:
            say("lost the connection to the launcher of node 0, so the ranks of this node are killed")
            self._is_lost = True
            self._node.kill()

    def _tick(self) -> int | None:
        self._node.tick()
        if self._node.ranks.are_running:
            return None
        return EXIT_FAULT if self._is_lost else self._status
