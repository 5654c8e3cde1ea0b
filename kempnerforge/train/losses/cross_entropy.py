"""The cross-entropy of whole logits, as ``train.loss = "cross_entropy"``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Return the cross-entropy in fp32, summed over all tokens whose target is not ``IGNORED``.

    Logits that tensor parallelism sharded over the vocabulary remain sharded under
    ``loss_parallel``, also in the backward.
    """
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten(), reduction="sum")


PLUGIN = cross_entropy
