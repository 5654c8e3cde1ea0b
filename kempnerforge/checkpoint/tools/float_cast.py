"""Cast between fp32, bf16 and fp16 without torch, rounding to nearest even as torch does."""

from __future__ import annotations

from typing import Any

import numpy as np

FLOATS: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    # NumPy has no bf16. These are its bits, the upper half of an fp32.
    "BF16": np.dtype("<u2"),
}
"""Safetensors name of a dtype of weights -> the NumPy dtype that stores its bits."""


def cast(data: np.ndarray, source: str, target: str) -> np.ndarray:
    """Cast values of dtype ``source`` to ``target``. Input and output are bytes: contiguous uint8 [n].

    Returns ``data`` itself if the dtypes are equal. Infinities and NaN are kept. Raises
    OverflowError for a finite value that ``target`` cannot hold.
    """
    if source == target:
        return data
    values = _to_fp32(data.view(FLOATS[source]), source)
    if target == "F32":
        return values.view(np.uint8)
    with np.errstate(over="ignore"):
        found = values.astype(FLOATS["F16"]) if target == "F16" else _to_bf16(values)
    exponent = 0x7C00 if target == "F16" else 0x7F80
    # Infinities and NaN have this exponent. Most weights have none, so one pass over all is enough.
    odd = (found.view(np.uint16) & exponent) == exponent
    if odd.any() and np.isfinite(values[odd]).any():
        largest = float(np.abs(values[odd][np.isfinite(values[odd])]).max())
        raise OverflowError(f"{largest:g}")
    return found.view(np.uint8)


def _to_fp32(values: np.ndarray, source: str) -> np.ndarray:
    if source == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


def _to_bf16(values: np.ndarray) -> np.ndarray:
    bits = values.view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        rounded[nan] = 0x7FC0
    return rounded
