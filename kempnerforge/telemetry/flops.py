"""Peak FLOP/s of known accelerators, and model FLOPs utilization."""

from __future__ import annotations

import re

# Dense bf16 peaks in FLOP/s, without structured sparsity: half of the sparse figure if the
# datasheet gives only that one. The first pattern that matches the name is used, so variants
# precede the plain name.
_PEAK_BF16 = tuple(
    (re.compile(pattern), peak)
    for pattern, peak in (
        (r"\bGB200\b", 2500e12),  # NVIDIA GB200 NVL72 datasheet: 360 PFLOPS sparse for 72
        (r"\bB200\b", 2250e12),  # NVIDIA HGX B200 datasheet: 36 PFLOPS sparse for 8
        (r"\bGH200\b", 989.4e12),  # NVIDIA GH200 datasheet: the H100 SXM's tensor cores
        (r"\bH200 NVL\b", 835.5e12),  # NVIDIA H200 datasheet: 1,671 TFLOPS sparse
        (r"\bH200\b", 989.4e12),  # NVIDIA H200 datasheet: 1,979 TFLOPS sparse
        (r"\bH100 NVL\b", 835.5e12),  # NVIDIA H100 NVL datasheet: 1,671 TFLOPS sparse
        (r"\bH100 PCIe\b", 756e12),  # NVIDIA H100 architecture whitepaper, table 2
        (r"\bH100\b", 989.4e12),  # NVIDIA H100 architecture whitepaper, table 2 (SXM5)
        (r"\bA100\b", 312e12),  # NVIDIA A100 datasheet; SXM4 and PCIe alike
        (r"\bA40\b", 149.7e12),  # NVIDIA A40 datasheet
        (r"\bA30\b", 165e12),  # NVIDIA A30 datasheet
        (r"\bA10\b", 125e12),  # NVIDIA A10 datasheet
        (r"\bL40S\b", 362.05e12),  # NVIDIA L40S datasheet
        (r"\bL4\b", 121e12),  # NVIDIA L4 datasheet: 242 TFLOPS sparse
        (r"\bMI300X\b", 1307.4e12),  # AMD Instinct MI300X datasheet
    )
)


def peak_bf16_flops(device_name: str) -> float | None:
    """Return the peak dense bf16 FLOP/s of a device by the name that its driver reports, or None if unknown.

    ``device_name`` is the result of ``torch.cuda.get_device_name()``, such as
    ``"NVIDIA H100 80GB HBM3"``. The peak of a MIG slice is unknown, because it is a fraction of the
    named device.
    """
    if re.search(r"\bMIG\b", device_name):
        return None
    for pattern, peak in _PEAK_BF16:
        if pattern.search(device_name):
            return peak
    return None


def mfu(tokens_per_s: float, flops_per_token: float, num_devices: int, peak: float) -> float:
    """Return the model FLOPs utilization: FLOP/s that the model needs, divided by the peak FLOP/s.

    Defined by Chowdhery et al. 2022 (PaLM), appendix B. Recomputation by activation checkpointing
    does not count.

    Args:
        tokens_per_s: throughput of the whole run.
        flops_per_token: FLOPs of forward and backward pass per token.
        num_devices: number of devices of the whole run.
        peak: peak FLOP/s of one device.
    """
    return tokens_per_s * flops_per_token / (num_devices * peak)
