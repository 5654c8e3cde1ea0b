"""Reductions over a vocabulary that tensor parallelism may shard. Shape suffixes: N tokens, V rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from kempnerforge.data.rows import IGNORED
from kempnerforge.torch_compat import compute_local_shape_and_global_offset


@dataclass(frozen=True)
class VocabShard:
    """The part of the vocabulary that this rank has. By default all of it.

    Collective on ``group``: ``maximum``, ``sum`` and ``pick``. The results have the same bits on all
    its ranks.
    """

    start: int = 0
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, tensor: DTensor, *, dim: int) -> VocabShard:
        """Return the part that this rank has of a tensor that is sharded along ``dim``."""
        _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        return cls(offset[dim], tensor.device_mesh.get_group())

    def maximum(self, logits_NV: Tensor) -> Tensor:
        """Return the largest logit of each token, [N]."""
        highest_N = logits_NV.amax(1)
        if self.group is not None:
            dist.all_reduce(highest_N, dist.ReduceOp.MAX, group=self.group)
        return highest_N

    def sum(self, values_NV: Tensor) -> Tensor:
        """Return the sum for each token, [N]."""
        return self._added(values_NV.sum(1))

    def pick(self, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        """Return the logit of each token's target, [N]; of an ignored one 0."""
        is_here, local_N = self._locate(logits_NV, targets_N)
        picked_N = logits_NV.gather(1, local_N[:, None]).squeeze(1)
        return self._added(torch.where(is_here, picked_N, 0))

    def subtract_(self, values_NV: Tensor, targets_N: Tensor, amounts_N: Tensor) -> None:
        """Subtract ``amounts_N`` at the targets that this rank has."""
        is_here, local_N = self._locate(values_NV, targets_N)
        rows = torch.arange(len(targets_N), device=targets_N.device)
        values_NV[rows, local_N] -= torch.where(is_here, amounts_N, 0)

    def _locate(self, values_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return whether each target is here, and its column; 0 if it is not."""
        local_N = targets_N - self.start
        is_here = (targets_N != IGNORED) & (local_N >= 0) & (local_N < values_NV.size(1))
        return is_here, torch.where(is_here, local_N, 0)

    def _added(self, values_N: Tensor) -> Tensor:
        if self.group is not None:
            dist.all_reduce(values_N, group=self.group)
        return values_N
