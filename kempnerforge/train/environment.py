"""Settings of the process: determinism, open files, and how much freed memory malloc keeps."""

from __future__ import annotations

import ctypes
import os
import resource

import torch
from torch.utils import deterministic as deterministic_utils

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 256 << 20
_LARGEST_BYTES = 32 << 20
"""The largest block that glibc can keep."""
_OPEN_FILES = 1 << 16


def set_determinism(deterministic: bool) -> None:
    """Set deterministic algorithms, a fixed cuBLAS workspace and a pinned collective algorithm.

    Call it before anything uses CUDA, which reads the environment when it starts.
    """
    if not deterministic:
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(True)
    # Filling every new tensor makes bugs visible, but costs time and changes no correct result.
    deterministic_utils.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def raise_open_file_limit() -> None:
    """Allow as many open files as the system lets this process have, up to 65,536.

    The usual limit, 1,024, exists for programs that use select(). Every mapped file of a dataset
    counts, and a mixture has several datasets.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def keep_freed_memory() -> None:
    """Make glibc's malloc keep the memory that a step on the CPU frees, for the next step.

    By default it returns large blocks to the kernel, which costs thousands of page faults and 2% of
    the time of a step. Does nothing when ``MALLOC_MMAP_THRESHOLD_`` or ``MALLOC_TRIM_THRESHOLD_``
    is set, or with another malloc. See mallopt(3).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys():
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_BYTES)
    mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
