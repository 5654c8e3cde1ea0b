"""A save that is under way when a script ends is committed, or the script says what was lost."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kempnerforge import AsyncCheckpointMode, SafetensorsReader
from kempnerforge.checkpoint.load.dcp_reader import load_tensors

SCRIPT = """
import sys, time
import torch
from kempnerforge import AsyncCheckpointer
from kempnerforge.checkpoint.save.writer_client import Writer

write = Writer.write

def slow_write(*args, **options):
    time.sleep(1.0)  # so long that the script has come to its end
    if "full disk" in sys.argv:
        raise OSError(28, "No space left on device")
    return write(*args, **options)

Writer.write = slow_write
"""
# A checkpointer that no name holds.
SAVE = 'AsyncCheckpointer(sys.argv[1]).save({"w": torch.arange(1000.0)}, sys.argv[2])\n'
ENDINGS = {
    "return": (SAVE, 0),
    "exception": (SAVE + 'raise KeyError("a bug")\n', 1),
    "sys.exit": (SAVE + "sys.exit(7)\n", 7),
    "destroyed group": (
        "import torch.distributed as dist\n"
        'dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)\n'
        + SAVE
        + "dist.destroy_process_group()\n",
        0,
    ),
}
MODES = [mode.value for mode in AsyncCheckpointMode]


def run_script(body: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT + body, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("mode", "ending"),
    [
        pytest.param(mode, ending, marks=[pytest.mark.smoke] if (mode, ending) == ("async", "return") else [])
        for mode in MODES
        for ending in ENDINGS
    ],
)
def test_save_at_end_of_script_is_committed(tmp_path: Path, mode: str, ending: str) -> None:
    body, status = ENDINGS[ending]
    done = run_script(body, mode, tmp_path / "c")
    assert done.returncode == status, done.stderr
    assert "was not saved" not in done.stderr
    target = {"w": torch.zeros(1000)}
    load_tensors(target, SafetensorsReader(tmp_path / "c"))
    assert torch.equal(target["w"], torch.arange(1000.0))
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("mode", MODES[1:])
def test_save_that_fails_at_end_of_script_is_named(tmp_path: Path, mode: str) -> None:
    done = run_script(SAVE, mode, tmp_path / "c", "full disk")
    assert f"kempnerforge: {tmp_path / 'c'} was not saved: rank 0: " in done.stderr
    assert "No space left on device" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_save_that_a_signal_cuts_off_is_named(tmp_path: Path, mode: str, number: signal.Signals) -> None:
    """Nothing runs in a process that a signal ends: its writer says what was lost. Nothing is committed."""
    body = (
        "import os, threading\n"
        "from kempnerforge.checkpoint.save import pipeline\n"
        f"end = lambda *_, **__: os.kill(os.getpid(), {int(number)}) or time.sleep(60)\n"
        "pipeline.commit = end\n"
    )
    done = run_script(body + SAVE, mode, tmp_path / "c")
    assert done.returncode == -number
    assert f"kempnerforge: {tmp_path / '.c.0.tmp'} is not committed" in done.stderr
    assert not (tmp_path / "c").exists()


RANKS = """
import torch.distributed as dist
dist.init_process_group("gloo")
mine = torch.full((1000,), dist.get_rank())
AsyncCheckpointer(sys.argv[1]).save({"w": torch.arange(1000.0), f"rank_{dist.get_rank()}": mine}, sys.argv[2])
"""


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ending", ["", "dist.destroy_process_group()\n"], ids=["return", "destroyed group"])
def test_save_of_two_ranks_at_end_is_committed(tmp_path: Path, mode: str, ending: str) -> None:
    """The first rank, whose process hosts the store, does not end before the others have no need of it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT + RANKS + ending, mode, str(tmp_path / "c")],
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [rank.communicate()[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], told
    target = {"w": torch.zeros(1000), "rank_1": torch.zeros(1000, dtype=torch.int64)}
    load_tensors(target, SafetensorsReader(tmp_path / "c"))
    assert target["rank_1"].sum() == 1000
