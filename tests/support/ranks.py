"""Run a function on several real ranks (gloo, one process each) from inside a test.

    from support.ranks import run_ranks

    def total(values: list[int]) -> int:          # top level of the test module, so that it can be pickled
        tensor = torch.tensor(values[dist.get_rank()])
        dist.all_reduce(tensor)
        return int(tensor)

    assert run_ranks(total, 2, [3, 4]) == [7, 7]

Each rank is a fresh process, forked from a server that has done the imports (``PRELOAD``), so it
joins a process group in a tenth of a second. It inherits neither threads, process groups nor random
state from the test process, but its environment, including ``monkeypatch.setenv``. ``fn`` runs in
the default process group, which is destroyed afterwards. ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``
and ``MASTER_ADDR`` are set as torchrun sets them. Rendezvous uses a file, so no port can be taken.

Arguments and results are pickled: send tensors (not DTensors), arrays, numbers, paths. The output
of the ranks is printed by the test process after they have ended, so that pytest shows it with a
failure.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

# fully_shard imports torch._dynamo at its first use, which takes longer than the rest of a small
# test.
PRELOAD = [
    *("torch", "torch.distributed.fsdp", "torch.distributed.tensor", "torch._dynamo", "numpy.random"),
    *("kempnerforge.checkpoint.manager", "kempnerforge.parallel.shard", "kempnerforge.train.step"),
]

SECOND_FAILURE_GRACE_S = 3.0
"""How long to wait, after a first failure, for errors of other ranks, since one of them may be the cause."""


STACKS_GRACE_S = 10.0
"""How long ranks that hang may take to print their stacks."""


EXIT_GRACE_S = 10.0
"""How long a rank may take, after it has sent its result, to leave its process group and exit."""


class RanksFailed(AssertionError):
    """A rank raised, died or hung. The message has the tracebacks of the ranks that raised."""


def gloo_group() -> dist.ProcessGroup:
    """Return a new gloo group of all ranks."""
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group


def run_ranks(fn: Callable[..., T], world_size: int, *args: Any, timeout_s: float = 120.0) -> list[T]:
    """Call ``fn(*args)`` on ``world_size`` ranks and return their results in the order of ranks.

    Raises RanksFailed if a rank raises, dies, or has not ended after ``timeout_s``. All other ranks
    are killed first, so that no process remains. After a timeout, the output shows the stacks of
    each rank.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    payload = pickle.dumps((fn, args, dict(os.environ)))
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks: list[Any] = []
        pipes: list[Connection] = []
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(
                    target=_rank_main, args=(rank, world_size, folder, timeout_s, payload, theirs)
                )
                process.start()
                theirs.close()
                ranks.append(process)
                pipes.append(ours)
            results = _collect(ranks, pipes, folder, timeout_s)
            for process in ranks:
                process.join(EXIT_GRACE_S)
            return results
        finally:
            for process in ranks:
                process.kill()
                process.join()
            for pipe in pipes:
                pipe.close()
            for rank in range(len(ranks)):
                _print_log(folder, rank)


def _log(folder: str, rank: int) -> Path:
    return Path(folder, f"rank_{rank}.log")


def _print_log(folder: str, rank: int) -> None:
    log = _log(folder, rank)
    if log.exists() and (text := log.read_text(errors="replace")):
        print(f"--- output of rank {rank} ---\n{text}", end="")


def _rank_main(
    rank: int, world_size: int, folder: str, timeout_s: float, payload: bytes, pipe: Connection
) -> None:
    """Run one rank: join, call, report, leave."""
    with open(_log(folder, rank), "wb") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    torch.set_num_threads(1)
    try:
        fn, args, env = pickle.loads(payload)
        os.environ.update(env)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        message = (True, fn(*args))
        data = pickle.dumps(message)
    except BaseException:  # noqa: BLE001 - whatever ends a rank must reach the test's output
        data = pickle.dumps((False, traceback.format_exc()))
    sys.stdout.flush()
    pipe.send_bytes(data)
    pipe.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def _collect(ranks: list[Any], pipes: list[Connection], folder: str, timeout_s: float) -> list[Any]:
    """Return the results of all ranks. Raises RanksFailed when one has failed, or after the time limit."""
    results: dict[int, Any] = {}
    failures: list[str] = []
    open_pipes = {pipe: rank for rank, pipe in enumerate(pipes)}
    deadline = time.monotonic() + timeout_s
    while open_pipes and (left_s := deadline - time.monotonic()) > 0:
        for ready in wait(list(open_pipes), timeout=left_s):
            assert isinstance(ready, Connection)
            rank = open_pipes.pop(ready)
            try:
                succeeded, value = pickle.loads(ready.recv_bytes())
            except EOFError:
                ranks[rank].join()
                succeeded, value = False, _describe_death(ranks[rank].exitcode)
            if succeeded:
                results[rank] = value
            elif not failures:
                failures.append(f"--- rank {rank} failed first ---\n{value}")
                deadline = min(deadline, time.monotonic() + SECOND_FAILURE_GRACE_S)
            else:
                failures.append(f"--- rank {rank} failed too ---\n{value}")
    if failures:
        raise RanksFailed("\n" + "\n".join(failures))
    if open_pipes:
        hanging = sorted(open_pipes.values())
        _ask_for_stacks([(ranks[rank], _log(folder, rank)) for rank in hanging])
        raise RanksFailed(f"ranks {hanging} have not ended after {timeout_s} s; where they stood is printed")
    return [results[rank] for rank in range(len(ranks))]


def _describe_death(exit_code: int) -> str:
    cause = signal.Signals(-exit_code).name if exit_code < 0 else f"exit status {exit_code}"
    return f"died without a word ({cause})"


def _ask_for_stacks(hanging: list[tuple[Any, Path]]) -> None:
    """Let ranks print their stacks. faulthandler does it in C, so that it works on a blocked rank."""
    asked = [log.stat().st_size for _, log in hanging]
    for process, _ in hanging:
        os.kill(process.pid, signal.SIGUSR1)
    seen, deadline = asked, time.monotonic() + STACKS_GRACE_S
    while time.monotonic() < deadline:
        time.sleep(0.2)
        before, seen = seen, [log.stat().st_size for _, log in hanging]
        if seen == before and all(now > then for now, then in zip(seen, asked, strict=True)):
            return
