"""Rows in which several documents stand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def document_ids(lengths: Sequence[Sequence[int]]) -> Tensor:
    """Return the document of each token, int32 [B, T], from the lengths of the documents of each row."""
    numbers = [torch.arange(len(row), dtype=torch.int32) for row in lengths]
    return torch.stack([n.repeat_interleave(torch.tensor(row)) for n, row in zip(numbers, lengths, strict=True)])
