"""Host buffers under a real memory limit: refused before the kernel kills."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from support.cgroups import memory_cgroup

MB = 1 << 20
SAVE = """
import sys, torch
from kempnerforge import AsyncCheckpointer
from kempnerforge.checkpoint.save import host_memory
from kempnerforge.errors import HostMemoryError
limits = host_memory.claim(0).limits
print(any("kempnerforge-test" in limit.name for limit in limits))
state = {"w": torch.zeros(int(sys.argv[2]) << 20, dtype=torch.uint8)}
state["w"].fill_(1)
with AsyncCheckpointer("async") as checkpointer:
    try:
        checkpointer.save(state, sys.argv[1])
    except HostMemoryError as error:
        print(f"refused, {checkpointer.host_bytes} bytes taken: {error}")
    else:
        print("saved")
"""


def save_within(cgroup: Path, folder: Path, size_mb: int) -> subprocess.CompletedProcess[str]:
    enter = f'echo $$ > "{cgroup}/cgroup.procs" && exec "$@"'
    python = [sys.executable, "-c", SAVE, str(folder / "step"), str(size_mb)]
    return subprocess.run(
        ["sh", "-c", enter, "sh", *python], capture_output=True, text=True, timeout=120, check=False
    )


def test_save_beyond_cgroup_limit_is_refused_not_killed(tmp_path: Path) -> None:
    with memory_cgroup(1000 * MB) as cgroup:
        ended = save_within(cgroup, tmp_path, 500)
        assert ended.returncode == 0, (ended.returncode, ended.stderr)
        is_seen, outcome = ended.stdout.splitlines()
        assert is_seen == "True"
        assert outcome.startswith("refused, 0 bytes taken: checkpoint.max_host_memory_gb: the host buffers")
        assert cgroup.name in outcome
        assert list(tmp_path.iterdir()) == []
        assert save_within(cgroup, tmp_path, 20).stdout.splitlines() == ["True", "saved"]
