"""A model, and values generated in the way of its initial weights."""

from __future__ import annotations

import math

import torch
import xxhash
from torch import Tensor

from kempnerforge.config.schema import ModelConfig
from kempnerforge.model.init import normal_

CONFIG = ModelConfig(
    dim=72, n_layers=2, n_heads=6, n_kv_heads=2, ffn_hidden_dim=100, vocab_size=15001, max_seq_len=8
)
"""A config whose embedding has several blocks of elements. Only ``dim`` can be halved often."""


def digest(tensor: Tensor) -> str:
    return xxhash.xxh3_64_hexdigest(tensor.detach().contiguous().numpy().tobytes())


def drawn(shape: tuple[int, ...], *, seed: int = 5, name: str = "layers.0.attention.wq.weight") -> Tensor:
    tensor = torch.full(shape, math.nan)
    normal_(tensor, seed=seed, name=name, std=0.02)
    return tensor
