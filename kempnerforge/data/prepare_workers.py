"""The processes that tokenize: each writes parts (:mod:`kempnerforge.data.token_parts`) for the parent.

A worker is started with a socket. It imports no torch, and the main module of the parent is not
imported again. It ends when the socket is closed, and the kernel kills it when the parent is killed.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

from kempnerforge.data.encoding import Encoder
from kempnerforge.data.token_parts import PART_NAME, Task, write_part
from kempnerforge.errors import DataError, KempnerForgeError
from kempnerforge.python_process import start_with_socket
from kempnerforge.rank_variables import FORWARDED, die_with_parent

MAX_THREADS = 4
"""Threads of a worker's tokenizer, if there are fewer tasks than processors. They need memory."""

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
    """Write the missing parts of ``tasks`` into ``parts``, with as many processes as ``workers``.

    ``workers`` None means one for each processor. Parts that exist are not written again. Calls
    ``finished`` for each task, in any order.

    Raises :class:`DataError` for text that cannot be read, OSError if a part cannot be written, and
    :class:`KempnerForgeError` if a worker died.
    """
    missing: deque[Task] = deque()
    for task in tasks:
        if _is_written(parts, task):
            finished(task)
        else:
            missing.append(task)
    cpus = workers or allowed_cpus()
    count = min(cpus, len(missing))
    if len(tasks) == 1 and missing and workers is None:  # too little text for another process
        write_part(missing[0], encoder, parts, lambda size, tokens: report(missing[0], size, tokens))
        finished(missing[0])
        return
    pool: list[_Worker] = []
    try:
        for _ in range(count):
            pool.append(_Worker(encoder, parts, threads=min(MAX_THREADS, max(1, cpus // count))))
        _run(pool, missing, parts, report, finished)
    finally:
        for worker in pool:
            worker.kill()


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


class _Worker:
    """The parent's side of one worker."""

    def __init__(self, encoder: Encoder, parts: Path, *, threads: int) -> None:
        self.task: Task | None = None
        environ = {
            **os.environ,
            "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false",
            "RAYON_NUM_THREADS": str(threads),
        }
        try:
            self._process, ours = start_with_socket(__name__, environ=environ)
        except OSError as error:
            raise KempnerForgeError(
                f"cannot start a process that tokenizes: {error.strerror}; give fewer --workers"
            ) from error
        self.connection = Connection(ours.detach())
        self._send((encoder, parts, threads))

    def give(self, task: Task) -> None:
        self.task = task
        self._send(task)

    def _send(self, value: object) -> None:
        try:
            self.connection.send(value)
        except OSError:
            raise self._died() from None

    def receive(self) -> tuple[int, int] | None:
        """Return the progress of the task, in bytes and tokens, or None when it is finished."""
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
        hint = "; it may have been out of memory: give fewer --workers" if status == -signal.SIGKILL else ""
        files = sorted({str(unit.file.path) for unit in self.task.units}) if self.task else []
        where = f" while it read {', '.join(files[:3])}" if files else ""
        return KempnerForgeError(
            f"a process that tokenizes ended with {cause}{where}{hint}. Run the same command to go on"
        )

    def kill(self) -> None:
        self.connection.close()
        self._process.kill()
        self._process.wait()


def main() -> None:
    """Write the parts of the tasks that arrive, until the socket is closed."""
    die_with_parent(int(sys.argv[2]))
    for number in FORWARDED:  # they may be sent to all processes; the parent ends its workers
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    encoder, parts, threads = connection.recv()
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            write_part(task, encoder, parts, lambda *done: connection.send(done), threads=threads)
        except (DataError, OSError) as error:
            connection.send(error)
        else:
            connection.send(None)
