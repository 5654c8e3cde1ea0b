"""The ranks of one node: start them, relay their output, signal them, and collect their statuses."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kempnerforge.rank_variables import FORWARDED, LAUNCHER_PID, RESTART_COUNT, STORE_FD

_READ_BYTES = 1 << 16
_MAX_LINE_BYTES = 1 << 16


@dataclass(frozen=True)
class NodeLayout:
    """The place of this node's ranks among all ranks."""

    num_nodes: int
    node_rank: int
    ranks_per_node: int

    @property
    def world_size(self) -> int:
        """Number of ranks on all nodes."""
        return self.num_nodes * self.ranks_per_node

    @property
    def first_rank(self) -> int:
        """The first rank of this node."""
        return self.node_rank * self.ranks_per_node


class RankProcesses:
    """The ranks of this node, one start after the other.

    Each rank has a session of its own, so that Ctrl-C in the terminal reaches only the launcher,
    which forwards it once. Rank 0 writes to the launcher's own output, so that its progress line
    works on a terminal. Lines of other ranks are written to standard error with their rank.

    Args:
        program: the command of a rank, without Python.
        layout: the place of the ranks.
        selector: the event loop, to which the output of the ranks is added.
        environ: the environment of the ranks, to which their places are added.
    """

    def __init__(
        self,
        program: Sequence[str],
        layout: NodeLayout,
        selector: selectors.BaseSelector,
        environ: Mapping[str, str],
    ) -> None:
        self.layout = layout
        self._command = [sys.executable, *program]
        self._selector = selector
        self._environ = dict(environ)
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._outputs: list[_RankOutput] = []
        self.statuses: dict[int, int] = {}
        """Rank -> status of each rank of this start that has ended."""

    @property
    def are_running(self) -> bool:
        """Whether any rank has not ended yet."""
        return len(self.statuses) < len(self._processes)

    def start(self, *, restart_count: int, address: str, port: int, store_fd: int) -> None:
        """Start all ranks of this node. ``store_fd`` listens at ``port``; -1 on nodes without rank 0."""
        self._processes, self.statuses = {}, {}
        common = {
            **self._environ,
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(self.layout.world_size),
            "LOCAL_WORLD_SIZE": str(self.layout.ranks_per_node),
            LAUNCHER_PID: str(os.getpid()),
            RESTART_COUNT: str(restart_count),
        }
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
        try:
            for local_rank in range(self.layout.ranks_per_node):
                rank = self.layout.first_rank + local_rank
                own = {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(local_rank),
                    STORE_FD: str(store_fd if rank == 0 else -1),
                }
                self._processes[rank] = subprocess.Popen(
                    self._command,
                    env={**common, **own},
                    stdin=subprocess.DEVNULL,
                    stdout=None if rank == 0 else subprocess.PIPE,
                    stderr=None if rank == 0 else subprocess.STDOUT,
                    pass_fds=(store_fd,) if rank == 0 else (),
                    start_new_session=True,
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for rank, process in self._processes.items():
            if process.stdout is not None:
                self._outputs.append(_RankOutput(rank, process.stdout.fileno(), self._selector))

    def poll(self) -> list[int]:
        """Return the ranks that ended since the last call, those ended by a signal first."""
        ended = []
        for rank, process in self._processes.items():
            if rank not in self.statuses and process.poll() is not None:
                self.statuses[rank] = process.returncode
                ended.append(rank)
        if ended and not self.are_running:
            self._close_outputs()
        # Ranks that lost a killed one end right after it.
        return sorted(ended, key=lambda rank: self.statuses[rank] >= 0)

    def send(self, number: int) -> None:
        """Send a signal to every rank that runs."""
        for rank, process in self._processes.items():
            if rank not in self.statuses:
                process.send_signal(number)

    def _close_outputs(self) -> None:
        # Not at the end of the file: a child that outlives its rank may hold the pipe open.
        for output in self._outputs:
            output.close()
        self._outputs = []
        for process in self._processes.values():
            if process.stdout is not None:
                process.stdout.close()


class _RankOutput:
    """Relays the lines of one rank to standard error."""

    def __init__(self, rank: int, fd: int, selector: selectors.BaseSelector) -> None:
        self._prefix = f"[rank {rank}] ".encode()
        self._fd = fd
        self._selector = selector
        self._rest = b""
        self._is_open = True
        os.set_blocking(fd, False)
        selector.register(fd, selectors.EVENT_READ, self.read)

    def read(self) -> bool:
        """Relay what there is to read. Return whether there may be more."""
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return False
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._write(line)
        if not data or len(self._rest) > _MAX_LINE_BYTES:
            self._flush()
        if not data:
            self._unregister()
        return bool(data)

    def close(self) -> None:
        """Relay the rest, and stop."""
        while self._is_open and self.read():
            pass
        self._flush()
        self._unregister()

    def _unregister(self) -> None:
        if self._is_open:
            self._is_open = False
            self._selector.unregister(self._fd)

    def _flush(self) -> None:
        if self._rest:
            self._write(self._rest)
        self._rest = b""

    def _write(self, line: bytes) -> None:
        write_line(self._prefix + line)


def write_line(line: bytes) -> None:
    """Write a line to standard error, below a progress line of rank 0. Ignore a closed pipe."""
    start = b"\r\x1b[2K" if os.isatty(2) else b""
    try:
        os.write(2, start + line + b"\n")
    except OSError:  # nobody reads it any more; the ranks train on
        return
