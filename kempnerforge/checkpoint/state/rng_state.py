"""Store the random number generators of one rank as one uint8 tensor.

Little-endian, format ``KFRNG001``:

======  =========================================================================================
bytes   what
======  =========================================================================================
8       ``KFRNG001``
2500    Python: 625 u32 of the Mersenne Twister (624 words and the position)
12      Python: u32 whether a Gaussian is cached, f64 that Gaussian
2500    NumPy's global generator: 624 u32 and u32 position
12      NumPy: u32 whether a Gaussian is cached, f64 that Gaussian
4 + n   u32 n, then torch's CPU generator, from ``torch.get_rng_state``
4 + m   u32 m, then the CUDA generator of this rank's device; m is 0 without CUDA
======  =========================================================================================
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import xxhash

from kempnerforge.errors import MismatchError

MAGIC = b"KFRNG001"
_FIXED = struct.Struct("<8s625IId625IId")


def capture(device: torch.device) -> torch.Tensor:
    """Return the state of all generators of this rank, uint8 [n]. Consumes no random numbers.

    Raises TypeError if NumPy's global generator was replaced by one of another kind.
    """
    _, words, gauss = random.getstate()
    twister = np.random.get_state(legacy=False)
    if twister["bit_generator"] != "MT19937":
        raise TypeError(
            f"NumPy's global generator is {twister['bit_generator']}, but only its own MT19937 is stored: "
            "create a separate Generator, and pass its state as extra="
        )
    raw = _FIXED.pack(
        MAGIC,
        *words,
        gauss is not None,
        gauss or 0.0,
        *twister["state"]["key"].tolist(),
        twister["state"]["pos"],
        twister["has_gauss"],
        twister["gauss"],
    )
    cpu = torch.get_rng_state().numpy().tobytes()
    cuda = torch.cuda.get_rng_state(device).numpy().tobytes() if device.type == "cuda" else b""
    raw += struct.pack("<I", len(cpu)) + cpu + struct.pack("<I", len(cuda)) + cuda
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def captured_on(state: torch.Tensor) -> str:
    """Return the device type of a captured state: ``cpu`` or ``cuda``. Raises what ``restore`` raises."""
    return "cuda" if _unpack(state)[2] else "cpu"


def restore(state: torch.Tensor, device: torch.device) -> None:
    """Set all generators of this rank to a captured state, which must have this type of device.

    Raises MismatchError for a state of another format.
    """
    values, cpu, cuda = _unpack(state)
    python, numpy_state = values[1:628], values[628:]
    random.setstate((3, tuple(python[:625]), python[626] if python[625] else None))
    key = np.array(numpy_state[:624], dtype=np.uint32)
    np.random.set_state(("MT19937", key, numpy_state[624], numpy_state[625], numpy_state[626]))
    torch.set_rng_state(torch.frombuffer(bytearray(cpu), dtype=torch.uint8))
    if cuda:
        torch.cuda.set_rng_state(torch.frombuffer(bytearray(cuda), dtype=torch.uint8), device)


def derive(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Seed all generators of this rank from (seed, step, rank), for example after a change of layout."""
    _seed(f"rng:{seed}:{step}:{rank}", device)


def _seed(key: str, device: torch.device) -> None:
    seed = xxhash.xxh3_64_intdigest(key.encode())
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):  # manual_seed seeds the current device
            torch.cuda.manual_seed(seed)


@contextmanager
def forked(key: str, device: torch.device) -> Iterator[None]:
    """Run the body with generators that are seeded from ``key``, and restore all of them afterwards."""
    python, numpy_state, cpu = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        _seed(key, device)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)


def _unpack(state: torch.Tensor) -> tuple[tuple[Any, ...], bytes, bytes]:
    """Return the part of fixed size, torch's CPU generator, and the CUDA generator, which may be empty."""
    raw = state.cpu().numpy().tobytes()
    if not raw.startswith(MAGIC):
        raise MismatchError(f"RNG state has format {raw[:8]!r}; this version reads {MAGIC!r}")
    cpu, rest = _take(raw[_FIXED.size :])
    return _FIXED.unpack_from(raw), cpu, _take(rest)[0]


def _take(raw: bytes) -> tuple[bytes, bytes]:
    (size,) = struct.unpack_from("<I", raw)
    return raw[4 : 4 + size], raw[4 + size :]
