"""Facts and limits of the machine, measured without code of the engine under test."""

from __future__ import annotations

import mmap
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

BLOCK_BYTES = 16 << 20


def facts(folder: Path) -> dict[str, Any]:
    """Return the facts about this machine on which the figures depend."""
    return {
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "file_system": _file_system(folder),
        "python": platform.python_version(),
        "torch": version("torch"),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS", ""),
        "load_average": round(os.getloadavg()[0], 2),
    }


def describe(facts: dict[str, Any]) -> str:
    """Return the facts in one line."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def cpu_seconds(*pids: int | None) -> float:
    """Return the processor time so far of this process with all its threads, and of ``pids``, in seconds."""
    total = 0.0
    for pid in (os.getpid(), *(pid for pid in pids if pid is not None)):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def raw_write_s(path: Path, size_bytes: int, *, barrier: Callable[[], object]) -> float:
    """Return the seconds until ``size_bytes`` are durable in a new file: 16 MiB direct writes and an fsync.

    All ranks write at once, between two barriers. File systems without direct writes use their
    cache.
    """
    size_bytes = -(-size_bytes // 4096) * 4096
    image = mmap.mmap(-1, -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES)
    noise = os.urandom(1 << 20)
    for start in range(0, len(image), len(noise)):
        image[start : start + len(noise)] = noise
    view = memoryview(image)
    fd = _open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    barrier()
    started = time.perf_counter()
    done = 0
    while done < size_bytes:
        done += os.write(fd, view[done : min(done + BLOCK_BYTES, size_bytes)])
    os.fsync(fd)
    barrier()
    took_s = time.perf_counter() - started
    os.close(fd)
    path.unlink()
    view.release()
    image.close()
    return took_s


def matmul_flops(device: torch.device, dtype: torch.dtype, *, width: int, seconds: float = 1.0) -> float:
    """Return the FLOP/s of square matrix products, which are an upper bound for a model."""
    a = torch.rand(width, width, device=device).to(dtype)
    torch.mm(a, a)
    finish(device)
    started, count = time.perf_counter(), 0
    while (took_s := time.perf_counter() - started) < seconds or not count:
        for _ in range(4):
            torch.mm(a, a)
        finish(device)
        count += 4
    return count * 2 * width**3 / took_s


def to_host_bytes_per_s(device: torch.device, size_bytes: int) -> float:
    """Return the bytes per second from a CUDA device to pinned memory, in the second of two copies."""
    source = torch.empty(size_bytes, dtype=torch.uint8, device=device)
    target = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
    target.copy_(source)
    started = time.perf_counter()
    target.copy_(source, non_blocking=True)
    finish(device)
    return size_bytes / (time.perf_counter() - started)


def finish(device: torch.device) -> None:
    """Wait for the work of the device, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def drop_cache(folder: Path) -> None:
    """Drop the pages of all files in ``folder`` from the cache, so that the next read is from the disk."""
    for path in folder.iterdir():
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_DIRECT, 0o666)
    except OSError:
        return os.open(path, flags, 0o666)


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _file_system(folder: Path) -> str:
    """Return the type of the file system of ``folder``: that of the longest mount point above it."""
    above = str(folder.resolve())
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    return max(
        (m for m in mounts if (above + "/").startswith(m[0].rstrip("/") + "/")), key=lambda m: len(m[0])
    )[1]
