"""A process that has imported all of training and forks attempts. Started by ``runs.py``.

``torchrun`` spends seconds of every start on imports. A fork of this process begins to train
immediately. It is a real process all the same, with its own memory and exit status.

    server ── supervisor of attempt 1 ── rank 0 ┐ one process group,
                                     └── rank 1 ┘ killed as a whole

A request is one JSON object, sent over a socket together with a separate socket for the attempt. On
that socket the supervisor sends two lines: the process ids of the ranks, and when all have ended,
their exit statuses. When the other end of the attempt's socket is closed, the supervisor kills the
group.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

# Python puts the script's folder on the path, instead of the folder that contains ``support``.
sys.path[0] = str(Path(__file__).parents[1])

PRELOAD = (
    "numpy.random",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint.hf_storage",
    "kempnerforge.cli.train",
    "kempnerforge.cli.evaluate",
    "kempnerforge.cli.generate",
    "kempnerforge.train.generation",
    "kempnerforge.train.run",
    "support.fault_injection",
)
MAX_REQUEST_BYTES = 1 << 18


def serve(requests: socket.socket) -> dict[str, Any] | None:
    """Fork a supervisor for every request until the other end closes.

    Return in every rank's process, with the task of that rank. Return None in all other processes.
    """
    while True:
        data, fds, _, _ = socket.recv_fds(requests, MAX_REQUEST_BYTES, 1)
        if not data:
            return None
        if os.fork() == 0:
            requests.close()
            return supervise(socket.socket(fileno=fds[0]), json.loads(data))
        os.close(fds[0])


def supervise(attempt: socket.socket, request: dict[str, Any]) -> dict[str, Any] | None:
    """Fork the ranks, wait for them, and send how they ended. Returns like ``serve``."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    ready, go = os.pipe()
    pids: list[int] = []
    for rank in range(len(request["ranks"])):
        pid = os.fork()
        if pid == 0:
            attempt.close()
            os.close(go)
            os.read(ready, 1)
            os.close(ready)
            return {**request, **request["ranks"][rank]}
        pids.append(pid)
        os.setpgid(pid, pids[0])
    os.close(ready)
    _send(attempt, {"pids": pids})
    os.close(go)
    waiting = {os.pidfd_open(pid): pid for pid in pids}
    statuses: dict[int, int] = {}
    while waiting:
        for fd in select.select([*waiting, attempt], [], [])[0]:
            if not isinstance(fd, int):  # ``attempt``
                os.killpg(pids[0], signal.SIGKILL)
                return None
            pid = waiting.pop(fd)
            statuses[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    _send(attempt, {"statuses": [statuses[pid] for pid in pids]})
    return None


def _send(attempt: socket.socket, message: dict[str, Any]) -> None:
    try:
        attempt.sendall(json.dumps(message).encode() + b"\n")
    except BrokenPipeError:
        return  # the loop over the ranks sees the closed end too, and kills them


def run_rank(task: dict[str, Any]) -> int:
    """Do what one rank of ``torchrun scripts/train.py`` does, after injecting the requested faults."""
    log = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.chdir(task["cwd"])
    os.environ.clear()
    os.environ.update(task["env"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    for module, function, arguments in task["faults"]:
        getattr(importlib.import_module(module), function)(**arguments)
    sys.argv = [task["program"], *task["arguments"]]
    return importlib.import_module(task["program"]).main() or 0


def end_process(task: dict[str, Any]) -> None:
    """Run the rank and end the process as Python does, except that modules are not destroyed (0.5 s)."""
    try:
        status = run_rank(task)
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:  # noqa: BLE001 - as at the top of any script
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    # The server ends when the test process closes its end of the socket. It runs in its own session,
    # which Ctrl-C in the terminal does not reach.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for name in PRELOAD:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # otherwise every garbage collection in a fork would copy all pages
    mine = serve(socket.socket(fileno=int(sys.argv[1])))
    if mine is not None:
        end_process(mine)
