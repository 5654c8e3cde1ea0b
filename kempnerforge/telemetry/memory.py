"""Peak memory of this process between two rows of metrics, on the device and on the host."""

from __future__ import annotations

import contextlib
import os
from typing import Any

_RESET_PEAK = b"5"
"""Written to ``/proc/self/clear_refs``, this resets the peak of the resident set size (Linux 4.0)."""


class PeakMemory:
    """Measures the peaks since the last ``collect``. That takes about 10 µs and no synchronization.

    Args:
        device: the torch device of this rank. Its memory is measured on CUDA only.
    """

    def __init__(self, device: Any) -> None:
        self._cuda_device = device if device.type == "cuda" else None
        self._status_fd = self._reset_fd = -1
        with contextlib.suppress(OSError):  # no Linux, or no /proc: the host's peak is left out
            self._status_fd = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # the peak is then that of the whole life of the process
            self._reset_fd = os.open("/proc/self/clear_refs", os.O_WRONLY | os.O_CLOEXEC)
        self.collect()

    def collect(self) -> dict[str, int]:
        """Return the peaks in bytes by metric name, and begin to measure anew."""
        peaks = {}
        if self._cuda_device is not None:
            import torch

            peaks["memory/device_peak_bytes"] = torch.cuda.max_memory_allocated(self._cuda_device)
            torch.cuda.reset_peak_memory_stats(self._cuda_device)
        if (host := self._host_peak_bytes()) is not None:
            peaks["memory/host_peak_bytes"] = host
        return peaks

    def _host_peak_bytes(self) -> int | None:
        if self._status_fd < 0:
            return None
        try:
            _, found, rest = os.pread(self._status_fd, 4096, 0).partition(b"VmHWM:")
            if self._reset_fd >= 0:
                os.pwrite(self._reset_fd, _RESET_PEAK, 0)
        except OSError:
            return None
        return int(rest.split(maxsplit=1)[0]) * 1024 if found else None
