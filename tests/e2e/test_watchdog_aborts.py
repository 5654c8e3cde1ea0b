"""What is recorded of a process that the watchdog of a process group ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kempnerforge.goodput.faults import read_faults

pytestmark = pytest.mark.smoke

NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:2363, "
CUDA = (
    "unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.23.4\n"
    "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 1 'invalid argument'"
)


ABORT = """
import ctypes, sys, time
from pathlib import Path
from kempnerforge.goodput.faults import FaultFile

run_dir, watchdog, raised, thread = sys.argv[1:]
faults = FaultFile(Path(run_dir), attempt=1, rank=0, host="n1", watchdog=watchdog == "watchdog")
if raised:
    faults.record(RuntimeError(raised))
libc = ctypes.CDLL(None)
if thread == "native":
    abort = ctypes.cast(libc.abort, ctypes.c_void_p)
    libc.pthread_create(ctypes.byref(ctypes.c_ulong()), None, abort, None)
    time.sleep(30)
libc.abort()
"""


@pytest.mark.parametrize(
    ("watchdog", "raised", "thread", "text", "by_peer"),
    [
        ("watchdog", "", "native", "Aborted", True),
        # An abort in Python's own thread, or where there is no NCCL, is nobody else's.
        ("watchdog", "", "python", "Aborted", False),
        ("", "", "native", "Aborted", False),
        # What was raised before the abort says more.
        ("watchdog", "CUDA error: unspecified launch failure", "native", "RuntimeError: CUDA error", False),
        ("watchdog", "Connection reset by peer", "python", "RuntimeError: Connection reset", True),
    ],
)
def test_fault_record_watchdog_abort_blames_peer(
    tmp_path: Path, watchdog: str, raised: str, thread: str, text: str, by_peer: bool
) -> None:
    command = [sys.executable, "-c", ABORT, str(tmp_path), watchdog, raised, thread]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == -signal.SIGABRT, done.stderr
    (fault,) = read_faults(tmp_path)
    assert (fault.host, fault.by_peer) == ("n1", by_peer)
    assert fault.text.startswith(text)
