"""Processes that read batches of a user's dataset, so that slow samples do not stop the training.

Batch ``i`` is read by worker ``i`` modulo their number, and received in order. A worker only reads: which
samples a batch has is decided by the rank, so a resume does not depend on the workers.

A worker is a new interpreter instead of a fork: the rank has threads, process groups and a CUDA
context. It ignores the signals that stop a rank, ends when the rank closes its socket, and is
killed by the kernel when the rank dies.

A dataset may start processes itself. They belong to the session of their worker, and are killed with it
by :mod:`kempnerforge.data.worker_guard`.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import traceback
from collections import deque
from typing import Any, Protocol

import numpy as np
import torch

from kempnerforge.data import worker_guard
from kempnerforge.errors import KempnerForgeError, PluginError
from kempnerforge.forked_children import leave_signals_to_parent
from kempnerforge.python_process import command, start_with_socket
from kempnerforge.rank_variables import FORWARDED, die_with_parent

_LENGTH = struct.Struct("<Q")


class Reader(Protocol):
    """Reads a batch. It is pickled for the workers."""

    def __call__(self, ids: np.ndarray) -> Any:
        """Return the batch of the samples ``ids``."""
        ...


class WorkerPool:
    """``num_workers`` processes that call ``reader``.

    Create it in a thread that lives as long as the pool: the kernel kills the workers when it ends.
    """

    def __init__(self, reader: Reader, *, name: str, num_workers: int) -> None:
        self._name = name
        self._workers: list[tuple[subprocess.Popen[bytes], socket.socket]] = []
        self._waiting: deque[int] = deque()
        self._requested = 0
        self._guard: subprocess.Popen[bytes] | None = None
        # The path first: without it a class of the reader might not be found.
        setup = pickle.dumps((sys.path, pickle.dumps(reader)))
        try:
            self._start(num_workers)
            for number in range(num_workers):
                self._send(number, setup)
        except BaseException:
            self.kill()
            self.close()
            raise

    def _start(self, num_workers: int) -> None:
        try:
            for _ in range(num_workers):
                self._workers.append(start_with_socket(__name__, new_session=True))
            sessions = [process.pid for process, _ in self._workers]
            self._guard = subprocess.Popen(
                command(worker_guard.__name__, os.getpid(), *sessions),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            raise KempnerForgeError(
                f"cannot start a process that reads data.dataset: {error.strerror}; set a smaller "
                "data.num_workers"
            ) from error

    @property
    def is_full(self) -> bool:
        """Whether every worker has a batch that was not received."""
        return len(self._waiting) == len(self._workers)

    def request(self, ids: np.ndarray) -> None:
        """Have the next worker read the batch of ``ids``.

        Call it only while the pool is not full: a worker that waits for its batch to be received
        takes no request, and both sides would wait.
        """
        number = self._requested % len(self._workers)
        self._requested += 1
        self._waiting.append(number)
        self._send(number, pickle.dumps(ids))

    def _send(self, number: int, data: bytes) -> None:
        try:
            _send(self._workers[number][1], data)
        except OSError:
            raise self._ended(number) from None

    def receive(self) -> Any:
        """Return the batch of the oldest request. Blocks until it has been read.

        Raises what the reader raised, and PluginError if the worker has ended.
        """
        number = self._waiting.popleft()
        try:
            batch, error = pickle.loads(_receive(self._workers[number][1]))
        except (EOFError, OSError):
            raise self._ended(number) from None
        if error is not None:
            raise error
        return batch

    def kill(self) -> None:
        """Kill the workers, with all processes that they started, and wait for the workers to end.

        A ``receive`` in another thread raises PluginError.
        """
        for process, connection in self._workers:
            process.kill()
            # A process that left the session may hold the other end open.
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        if self._guard is not None:  # else there are no sessions that a dataset has seen
            worker_guard.kill_sessions([process.pid for process, _ in self._workers])
            self._guard.kill()
            self._guard.wait()
            self._guard = None  # from now on others may have the ids of these sessions
        for process, _ in self._workers:
            process.wait()

    def close(self) -> None:
        """Close the sockets. Call it after ``kill``, when no thread is in ``receive``."""
        for _, connection in self._workers:
            connection.close()

    def _ended(self, number: int) -> PluginError:
        status = self._workers[number][0].wait()
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        memory = "; is the node out of memory?" if status == -signal.SIGKILL else ""
        return PluginError(f'a worker of data.dataset "{self._name}" {how}{memory}')


def _send(connection: socket.socket, data: bytes) -> None:
    connection.sendall(_LENGTH.pack(len(data)))
    connection.sendall(data)


def _receive(connection: socket.socket) -> bytearray:
    (size,) = _LENGTH.unpack(_receive_exactly(connection, _LENGTH.size))
    return _receive_exactly(connection, size)


def _receive_exactly(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        received = connection.recv_into(view[done:])
        if not received:
            raise EOFError
        done += received
    return data


def main() -> None:
    """Read batches until the rank closes the socket."""
    for number in FORWARDED:
        signal.signal(number, signal.SIG_IGN)
    # A handler instead, because programs that the dataset starts would ignore it too, and not be ended by it.
    signal.signal(signal.SIGTERM, lambda _number, _frame: None)
    signal.siginterrupt(signal.SIGTERM, False)
    leave_signals_to_parent(FORWARDED)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    die_with_parent(int(sys.argv[2]))
    connection = socket.socket(fileno=int(sys.argv[1]))
    # A process that the dataset starts must not hold it open: the rank would miss the end of the worker.
    connection.set_inheritable(False)
    os.register_at_fork(after_in_child=connection.close)
    try:
        sys.path[:], pickled = pickle.loads(_receive(connection))
        reader: Reader | Exception
        try:
            reader = pickle.loads(pickled)
        except Exception as error:  # noqa: BLE001  raised in the rank
            reader = error
        torch.set_num_threads(1)
        while True:
            ids = pickle.loads(_receive(connection))
            _send(connection, _read(reader, ids))
    except (EOFError, OSError):
        return  # the rank has closed the socket, or has ended


def _read(reader: Reader | Exception, ids: np.ndarray) -> bytes:
    """Return ``(batch, None)`` or ``(None, exception)``, pickled."""
    try:
        if isinstance(reader, Exception):
            raise reader
        return pickle.dumps((reader(ids), None), protocol=5)
    except KempnerForgeError as error:
        return pickle.dumps((None, error))
    except Exception as error:  # noqa: BLE001  raised in the rank
        text = "".join(traceback.format_exception(error))
        return pickle.dumps((None, RuntimeError(f"in a worker of data.dataset:\n{text}")))
