"""Samples as they are read: token ids, which of them count, and the documents they belong to.

Shape suffixes: N samples, T inputs of a sample (``seq_len``). This module does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

IGNORED = -100
"""The target of an input that counts nothing: not in the loss, the gradients or the throughput. The
value is that of ``ignore_index`` of ``torch.nn.functional.cross_entropy``."""


@dataclass(frozen=True)
class Rows:
    """N samples of T inputs each."""

    tokens: np.ndarray
    """Token ids, int64 [N, T + 1]. Targets are the inputs, one position later."""
    counted: np.ndarray | None = None
    """Which targets count, bool [N, T]. None means all."""
    document_ids: np.ndarray | None = None
    """The document of each input, int32 [N, T]: numbers that begin at 0 and increase within a row.
    None means that attention does not end at the borders of documents."""

    @property
    def inputs(self) -> np.ndarray:
        """Token ids, int64 [N, T]."""
        return self.tokens[:, :-1]

    @property
    def targets(self) -> np.ndarray:
        """The token after each input, int64 [N, T]. ``IGNORED`` where it does not count."""
        targets = self.tokens[:, 1:]
        return targets if self.counted is None else np.where(self.counted, targets, IGNORED)
