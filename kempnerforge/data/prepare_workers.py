"""The processes that tokenize: each writes parts (:mod:`kempnerforge.data.token_parts`) for the parent.

If there are fewer tasks than processors, as for one large file that cannot be divided, a worker has
helpers: it reads the file and writes the part, and they encode what it has read.

A process is started with a socket. It imports no torch, and the main module of the parent is not
imported again. It ends when the socket is closed, and the kernel kills it when the parent is killed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from kempnerforge.data.encoding import Batch, Encoder, Result
from kempnerforge.data.token_parts import PART_NAME, Task, write_part
from kempnerforge.errors import KempnerForgeError
from kempnerforge.python_process import start_with_socket
from kempnerforge.rank_variables import FORWARDED, die_with_parent

HELPER_BYTES = 4 << 20
"""A worker has no more than one helper for so many bytes of its first task. A single task of no more is
written by the parent itself."""

FEWER = "run kempnerforge data prepare with fewer --workers"

TaskReport = Callable[[Task, int, int], None]
"""Called with the bytes of text and the tokens that were written for a task since the last call."""


def allowed_cpus() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0))


def write_parts(
    tasks: Sequence[Task],
    encoder: Encoder,
    parts: Path,
    *,
    workers: int | None,
    report: TaskReport,
    finished: Callable[[Task], None],
) -> None:
    """Write the missing parts of ``tasks`` into ``parts``. As many processes as ``workers`` tokenize.

    ``workers`` None means one for each processor. The largest task is begun first, so that it does
    not go on alone at the end. Parts that exist are not written again. Calls
    ``finished`` for each task, in any order.

    Raises :class:`DataError` for text that cannot be read, OSError if a part cannot be written, and
    :class:`KempnerForgeError` if a worker died.
    """
    missing: deque[Task] = deque()
    for task in sorted(tasks, key=lambda task: -task.size_bytes):
        if _is_written(parts, task):
            finished(task)
        else:
            missing.append(task)
    if not missing:
        return
    largest = missing[0]
    if len(tasks) == 1 and largest.size_bytes <= HELPER_BYTES and workers is None:
        write_part(largest, encoder, parts, lambda size, tokens: report(largest, size, tokens))
        finished(largest)
        return
    pool: list[_Worker] = []
    try:
        for num_helpers in helpers_of_workers(missing, workers or allowed_cpus()):
            pool.append(_Worker(encoder, parts, num_helpers))
        _run(pool, missing, parts, report, finished)
    finally:
        for worker in pool:
            worker.kill()


def helpers_of_workers(tasks: Sequence[Task], num_processes: int) -> list[int]:
    """Return the number of helpers of each worker, so that ``num_processes`` tokenize.

    A worker begins with one of ``tasks``, the largest of which comes first, and has processes by its
    share of all bytes. One without helpers tokenizes itself.
    """
    shares: list[int] = []
    size_bytes = sum(task.size_bytes for task in tasks)
    for task in tasks:
        left = num_processes - sum(shares)
        if not left:
            break
        share = round(left * task.size_bytes / size_bytes) if size_bytes else 1
        shares.append(max(1, min(left, share, -(-task.size_bytes // HELPER_BYTES))))
        size_bytes -= task.size_bytes
    return [share if share > 1 else 0 for share in shares]


def _is_written(parts: Path, task: Task) -> bool:
    return (parts / task.name / PART_NAME).is_file()


def _run(
    pool: Sequence[_Worker],
    missing: deque[Task],
    parts: Path,
    report: TaskReport,
    finished: Callable[[Task], None],
) -> None:
    """Give every worker the next task when it has finished one."""

    def give_next(worker: _Worker) -> None:
        while missing:
            task = missing.popleft()
            if not _is_written(parts, task):  # another process may have written it meanwhile
                worker.give(task)
                return
            finished(task)

    for worker in pool:
        give_next(worker)
    while busy := {worker.connection: worker for worker in pool if worker.task is not None}:
        for connection in wait(list(busy)):
            worker = busy[connection]  # type: ignore[index]  # only connections were given
            assert worker.task is not None
            progress = worker.receive()
            if progress is not None:
                report(worker.task, *progress)
                continue
            finished(worker.task)
            worker.task = None
            give_next(worker)


class _Process:
    """The side of the process that started another one."""

    def __init__(self, setup: object) -> None:
        environ = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        try:
            self._process, ours = start_with_socket(__name__, environ=environ)
        except OSError as error:
            raise KempnerForgeError(
                f"cannot start a process that tokenizes: {error.strerror}; {FEWER}"
            ) from error
        self.connection = Connection(ours.detach())
        self.task: Task | None = None
        self._setup: list[object] = [setup]

    def send(self, value: object) -> None:
        """Send ``value``. The first call waits until the process has imported what it needs."""
        try:
            while self._setup:
                self.connection.send(self._setup.pop())
            self.connection.send(value)
        except OSError:
            raise self._died() from None

    def receive(self) -> Any:
        """Return what the process has sent. Raises it if it is an exception."""
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _died(self) -> KempnerForgeError:
        status = self._process.wait()
        cause = f"signal {-status}" if status < 0 else f"status {status}"
        hint = f"; it may have been out of memory: {FEWER}" if status == -signal.SIGKILL else ""
        return KempnerForgeError(
            f"a process that tokenizes ended with {cause}{self._where()}{hint}. Run the same command to go on"
        )

    def _where(self) -> str:
        files = sorted({unit.file.name for unit in self.task.units}) if self.task else []
        return f" while it read {', '.join(files[:3])}" if files else ""

    def kill(self) -> None:
        self.connection.close()
        self._process.kill()
        self._process.wait()


class _Worker(_Process):
    """A process that writes parts. What it sends is its progress, in bytes and tokens, or None at the end."""

    def __init__(self, encoder: Encoder, parts: Path, num_helpers: int) -> None:
        super().__init__((_write_tasks, encoder, parts, num_helpers))

    def give(self, task: Task) -> None:
        self.task = task
        self.send(task)


def main() -> None:
    """Do what the first message says, until the socket is closed."""
    die_with_parent(int(sys.argv[2]))
    for number in FORWARDED:  # they may be sent to all processes; the parent ends its workers
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent has ended
        serve, *setup = connection.recv()
        serve(connection, *setup)


def _write_tasks(connection: Connection, encoder: Encoder, parts: Path, num_helpers: int) -> None:
    """Write the parts of the tasks that arrive."""
    try:
        helpers = [_Process((_encode_batches, encoder)) for _ in range(num_helpers)]
        encode = functools.partial(_encode_by, helpers) if helpers else None
        for task in _received(connection):
            for helper in helpers:
                helper.task = task
            write_part(task, encoder, parts, lambda *done: connection.send(done), encode=encode)
            connection.send(None)
    except (KempnerForgeError, OSError) as error:  # then the parent ends all workers
        connection.send(error)


def _encode_by(helpers: Sequence[_Process], batches: Iterator[Batch]) -> Iterator[Result]:
    """Have ``helpers`` encode ``batches``, one each at a time, and yield the results in order."""
    busy: deque[_Process] = deque()
    for number, batch in enumerate(batches):
        # It waits for its next batch until its results are received, so neither side waits for the other.
        results = busy.popleft().receive() if len(busy) == len(helpers) else ()
        helper = helpers[number % len(helpers)]
        helper.send(batch)
        busy.append(helper)
        yield from results
    for helper in busy:
        yield from helper.receive()


def _encode_batches(connection: Connection, encoder: Encoder) -> None:
    """Encode the batches that arrive."""
    for batch in _received(connection):
        try:
            results = list(encoder.encode(batch))
        except KempnerForgeError as error:
            connection.send(error)
        else:
            connection.send(results)


def _received(connection: Connection) -> Iterator[Any]:
    while True:
        try:
            yield connection.recv()
        except EOFError:
            return
