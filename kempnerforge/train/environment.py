"""Sets what bitwise equality depends on beside config and layout, and what malloc gives back."""

from __future__ import annotations

import ctypes
import os

import torch
from torch.utils import deterministic as deterministic_utils

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 256 << 20
_LARGEST_BYTES = 32 << 20
"""The largest block that glibc keeps at all."""


def set_determinism(deterministic: bool) -> None:
    """Deterministic algorithms, a fixed cuBLAS workspace and a pinned collective algorithm.

    Before anything touches CUDA: the environment is read when it starts.
    """
    if not deterministic:
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(True)
    # It fills every fresh tensor to make bugs visible, which costs time and changes no correct result.
    deterministic_utils.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def keep_freed_memory() -> None:
    """Let malloc keep what a step on the CPU frees for the next step, where this is glibc's malloc.

    By its own rules it gives large blocks back to the kernel: thousands of page faults, 2% of a step's time.
    What ``MALLOC_MMAP_THRESHOLD_`` or ``MALLOC_TRIM_THRESHOLD_`` say is left alone. See mallopt(3).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys():
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_BYTES)
    mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
