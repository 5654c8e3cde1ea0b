"""How much memory there is for host buffers: on the machine and in cgroups of both versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from kempnerforge.checkpoint.save import host_memory
from kempnerforge.checkpoint.save.host_memory import Claim, Limit

MB = 1 << 20
V1_NONE = "9223372036854771712"


def proc_of(folder: Path, *, cgroup: str, mountinfo: str) -> Path:
    """What ``/proc`` has of a process on a machine with 900 MB to spare."""
    (folder / "self").mkdir(parents=True)
    (folder / "meminfo").write_text("MemTotal: 2048000 kB\nMemAvailable: 921600 kB\nBuffers: 12 kB\n")
    (folder / "self/cgroup").write_text(cgroup)
    (folder / "self/mountinfo").write_text(mountinfo)
    return folder


def v2(folder: Path, *, limit: str, used_mb: int, cache_mb: int, high: str = "max") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(limit + "\n")
    (folder / "memory.high").write_text(high + "\n")
    (folder / "memory.current").write_text(f"{used_mb * MB}\n")
    stat = f"anon 5\nfile {cache_mb * MB}\nshmem 0\nactive_file {cache_mb * MB}\ninactive_file 0\n"
    (folder / "memory.stat").write_text(stat)
    return folder


def v1(folder: Path, *, limit: str, used_mb: int, cache_mb: int, hierarchical: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(limit + "\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used_mb * MB}\n")
    (folder / "memory.use_hierarchy").write_text(f"{int(hierarchical)}\n")
    stat = f"cache 0\ninactive_file 0\ntotal_inactive_file {cache_mb * MB}\ntotal_active_file 0\n"
    (folder / "memory.stat").write_text(stat)
    return folder


def free_mb(proc: Path) -> dict[str, int]:
    """By the last part of its path: what each limit has left; the machine's is ``machine``."""
    machine, *cgroups = host_memory.claim(1, proc=proc).limits
    found = {limit.name.split(" of ")[0].rpartition("/")[2]: limit.free_bytes // MB for limit in cgroups}
    return {"machine": machine.free_bytes // MB, **found}


def test_claim_without_cgroups_has_what_is_available(tmp_path: Path) -> None:
    assert free_mb(proc_of(tmp_path / "proc", cgroup="", mountinfo="")) == {"machine": 900}


def test_claim_cgroup_v2_counts_ancestors_and_drops_cache(tmp_path: Path) -> None:
    mount = tmp_path / "a mount"
    v2(mount / "slurm" / "job", limit=str(600 * MB), used_mb=450, cache_mb=100)
    v2(mount / "slurm" / "job" / "step", limit="max", used_mb=400, cache_mb=90)
    v2(mount / "slurm" / "job" / "step" / "task", limit="max", high=str(500 * MB), used_mb=300, cache_mb=10)
    escaped = str(mount).replace(" ", "\\040")
    proc = proc_of(
        tmp_path / "proc",
        cgroup="0::/slurm/job/step/task\n",
        mountinfo="23 27 0:22 / /sys rw - sysfs sysfs rw\n"
        f"41 31 0:38 / {escaped} rw shared:4 - cgroup2 cgroup rw\n",
    )
    assert free_mb(proc) == {"machine": 900, "task": 210, "job": 250}


def test_claim_cgroup_v1_counts_hierarchical_ancestors(tmp_path: Path) -> None:
    mount = tmp_path / "memory"
    v1(mount, limit=V1_NONE, used_mb=0, cache_mb=0)
    v1(mount / "uid", limit=str(10 * MB), used_mb=0, cache_mb=0, hierarchical=False)
    v1(mount / "uid" / "job", limit=str(800 * MB), used_mb=300, cache_mb=50)
    v1(mount / "uid" / "job" / "step", limit=V1_NONE, used_mb=300, cache_mb=50)
    proc = proc_of(
        tmp_path / "proc",
        cgroup="9:name=systemd:/\n4:cpu,memory:/uid/job/step\n0::/\n",
        mountinfo=f"35 31 0:32 / {mount} rw - cgroup cgroup rw,cpu,memory\n"
        f"36 31 0:33 / {tmp_path / 'unified'} rw - cgroup2 cgroup2 rw\n",
    )
    assert free_mb(proc) == {"machine": 900, "job": 550}


def test_claim_in_container_takes_root_of_its_mount(tmp_path: Path) -> None:
    """Without a cgroup namespace the path is the host's, and the mount shows only what is below it."""
    mount = v2(tmp_path / "cgroup", limit=str(300 * MB), used_mb=100, cache_mb=0)
    inside = proc_of(
        tmp_path / "inside",
        cgroup="0::/docker/4711\n",
        mountinfo=f"41 31 0:38 /docker/4711 {mount} ro - cgroup2 cgroup rw\n",
    )
    moved = proc_of(
        tmp_path / "moved",
        cgroup="0::/../outside\n",
        mountinfo=f"41 31 0:38 / {mount} ro - cgroup2 cgroup rw\n",
    )
    assert free_mb(inside) == free_mb(moved) == {"machine": 900, "cgroup": 200}


def test_claim_cgroup_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    mount = v2(tmp_path / "cgroup", limit=str(100 * MB), used_mb=150, cache_mb=10)
    mountinfo = f"41 31 0:38 / {mount} ro - cgroup2 cgroup rw\n"
    assert free_mb(proc_of(tmp_path / "proc", cgroup="0::/\n", mountinfo=mountinfo))["cgroup"] == 0


@pytest.mark.parametrize("broken", ["memory.stat", "memory.current"])
def test_claim_cgroup_that_cannot_be_read_limits_nothing(broken: str, tmp_path: Path) -> None:
    mount = v2(tmp_path / "cgroup", limit=str(100 * MB), used_mb=10, cache_mb=0)
    (mount / broken).write_text("nonsense\n")
    mountinfo = f"41 31 0:38 / {mount} ro - cgroup2 cgroup rw\n"
    assert free_mb(proc_of(tmp_path / "proc", cgroup="0::/\n", mountinfo=mountinfo)) == {"machine": 900}


MACHINE = Limit("boot", "on n1", 1000 * MB)


def rank(needed_mb: int, *limits: Limit, host: str = "n1") -> Claim:
    return Claim(needed_mb * MB, host, limits or (MACHINE,))


def in_cgroup(key: str, free: int) -> Limit:
    return Limit(f"boot {key}", f"in the cgroup /{key} of n1", free * MB)


def test_memory_fault_adds_up_ranks_of_a_machine() -> None:
    assert host_memory.fault([rank(400), rank(400)], None) is None
    found = host_memory.fault([rank(400), rank(400), rank(200)], None)
    assert found is not None
    assert "take 1.05 GB, and about 0.94 GB are free" in found.problem


def test_memory_fault_goes_by_machine_not_host_name() -> None:
    """Two containers of one machine have names of their own; two machines may share one."""
    other_machine = Limit("boot2", "on n1", 1000 * MB)
    assert host_memory.fault([rank(800), rank(800, other_machine)], None) is None
    assert host_memory.fault([rank(800), rank(800, host="n1-container")], None) is not None


def test_memory_fault_goes_by_cgroup_too() -> None:
    a, b = in_cgroup("a", 300), in_cgroup("b", 300)
    assert host_memory.fault([rank(200, MACHINE, a), rank(200, MACHINE, b)], None) is None
    found = host_memory.fault([rank(200, MACHINE, a), rank(200, MACHINE, a)], None)
    assert found is not None
    assert "in the cgroup /a of n1" in found.problem


def test_memory_fault_takes_the_least_that_a_rank_saw() -> None:
    less = Limit("boot", "on n1", 100 * MB)
    assert host_memory.fault([rank(100), rank(100, less)], None) is not None


def test_memory_fault_set_bound_alone_counts() -> None:
    """Who sets a bound wants to try: what seems to be free is not asked for."""
    poor = Limit("boot", "on n1", 0)
    assert host_memory.fault([rank(100, poor), rank(100, poor)], 0.3) is None
    found = host_memory.fault([rank(100, poor), rank(100, poor)], 0.2)
    assert found is not None
    assert (found.key, found.allowed.split(",")[0]) == ("checkpoint.max_host_memory_gb", "at least 0.21")
