"""Muon for hidden matrices, AdamW for all other parameters.

Muon (https://kellerjordan.github.io/posts/muon) orthogonalizes the momentum of a whole matrix by
Newton-Schulz iterations. If a matrix is sharded, one rank gathers it, orthogonalizes it, and sends
each rank its shard back, so that no matrix is orthogonalized twice. Matrices are divided evenly
among all ranks of the mesh, replicas included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from kempnerforge.checkpoint.state.pieces import Boxes, local_part
from kempnerforge.distributed import timeouts

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
BF16_BYTES = 2


def orthogonalize(matrix: Tensor, *, steps: int, eps: float) -> Tensor:
    """Return U V^T of the singular value decomposition U S V^T of ``matrix``, approximately, in bf16.

    The singular values of the result are between about 0.7 and 1.2. The arithmetic is that of
    ``torch.optim.Muon``.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrix.size(0) > matrix.size(1)
    result = matrix.bfloat16()
    result = result.T if is_tall else result
    result = result / result.norm().clamp(min=eps)  # the spectral norm is now at most 1
    for _ in range(steps):
        gram = result @ result.T
        gram = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        result = torch.addmm(result, gram, result, beta=a)
    return result.T if is_tall else result


class Muon(torch.optim.Optimizer):
    """Muon for matrices, whole or sharded in any way. Its state is ``momentum_buffer``.

    A parameter with more dimensions, such as the kernel of a convolution, is a matrix of its first
    dimension and all others. With ``adjust_lr_fn`` "match_rms_adamw" (arXiv:2502.16982) updates are
    as large as AdamW's, so that both can have the same learning rate. "original" scales by the
    shape only.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "original",
        eps: float = 1e-7,
    ) -> None:
        if adjust_lr_fn not in ("original", "match_rms_adamw"):
            raise ValueError(f'adjust_lr_fn {adjust_lr_fn!r}: use "original" or "match_rms_adamw"')
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov}
        super().__init__(params, {**defaults, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn, "eps": eps})
        self._layouts: dict[DeviceMesh, _Layout] = {}
        for group in self.param_groups:
            for param in group["params"]:
                if param.ndim < 2:
                    raise ValueError(f"a parameter of shape {tuple(param.shape)} is not a matrix")
                self.state[param]["momentum_buffer"] = torch.zeros_like(param)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Make one update. Collective: all ranks of the parameters' meshes."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        sharded: dict[DeviceMesh, list[_Work]] = {}
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                grad, buffer = local_part(param.grad), local_part(self.state[param]["momentum_buffer"])
                buffer.lerp_(grad, 1 - group["momentum"])
                momentum = grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
                work = _Work(param, momentum.bfloat16(), group)
                if isinstance(param, DTensor) and param.device_mesh.size() > 1:
                    sharded.setdefault(param.device_mesh, []).append(work)
                else:
                    work.apply(work.orthogonalized(work.momentum))
        for mesh, works in sharded.items():
            if mesh not in self._layouts:
                self._layouts[mesh] = _Layout(mesh)
            self._layouts[mesh].run(works)
        return loss


@dataclass(frozen=True)
class _Work:
    """One matrix to update."""

    param: Tensor
    momentum: Tensor
    """This rank's shard, in bf16."""
    group: dict[str, Any]

    def orthogonalized(self, whole: Tensor) -> Tensor:
        """Orthogonalize the whole matrix."""
        result = orthogonalize(whole.flatten(1), steps=self.group["ns_steps"], eps=self.group["eps"])
        return result.reshape(whole.shape)

    def apply(self, update: Tensor) -> None:
        """Update this rank's shard."""
        group, weight = self.group, local_part(self.param)
        rows, columns = self.param.size(0), math.prod(self.param.shape[1:])
        if group["adjust_lr_fn"] == "original":
            scale = math.sqrt(max(1, rows / columns))
        else:
            scale = 0.2 * math.sqrt(max(rows, columns))
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(update, alpha=-group["lr"] * scale)


Box = tuple[slice, ...]


class _Layout:
    """The ranks of a mesh, and which part of each matrix they hold."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._mesh = mesh
        self._ranks: list[int] = mesh.mesh.flatten().tolist()
        self._me = self._ranks.index(dist.get_rank())
        self._boxes: dict[Tensor, list[Box]] = {}

    @cached_property
    def _group(self) -> dist.ProcessGroup:
        """The process group of all ranks of the mesh."""
        if self._mesh.ndim == 1:
            return self._mesh.get_group()
        if len(self._ranks) == dist.get_world_size():
            assert dist.group.WORLD is not None
            return dist.group.WORLD
        group = dist.new_group(self._ranks, use_local_synchronization=True)
        timeouts.give_all_groups_the_default_timeout()
        assert isinstance(group, dist.ProcessGroup)
        return group

    def run(self, works: Sequence[_Work]) -> None:
        """Update all matrices, in rounds of at most one matrix per rank, the largest first."""
        if missing := [work.param for work in works if work.param not in self._boxes]:
            self._exchange_boxes(missing)
        by_size = sorted(works, key=lambda work: -work.param.numel())
        for number, begin in enumerate(range(0, len(by_size), len(self._ranks))):
            of_round = by_size[begin : begin + len(self._ranks)]
            # Every other round starts at the other end, so that no rank always gets the largest.
            owners = range(len(of_round)) if number % 2 == 0 else range(-1, -len(of_round) - 1, -1)
            self._run_round({owner % len(self._ranks): w for owner, w in zip(owners, of_round, strict=True)})

    def _exchange_boxes(self, params: Sequence[Tensor]) -> None:
        mine = []
        for param in params:
            assert isinstance(param, DTensor)
            mine.append(Boxes().of("a parameter of Muon", param))
        everyone: list[Any] = [None] * len(self._ranks)
        dist.all_gather_object(everyone, mine, group=self._group)
        for index, param in enumerate(params):
            boxes = [of_rank[index] for of_rank in everyone]
            self._boxes[param] = [
                tuple(slice(o, o + s) for s, o in zip(sizes, offsets, strict=True))
                for sizes, offsets in boxes
            ]

    def _senders(self, work: _Work, owner: int) -> Iterator[tuple[int, Box]]:
        """Yield the ranks that send their shard to the owner: of replicas, one."""
        holders: dict[Any, list[int]] = {}
        for rank, box in enumerate(self._boxes[work.param]):
            holders.setdefault(tuple((s.start, s.stop) for s in box), []).append(rank)
        for ranks in holders.values():
            rank = ranks[owner % len(ranks)]
            yield rank, self._boxes[work.param][rank]

    def _run_round(self, works: dict[int, _Work]) -> None:
        """Update at most one matrix per rank. ``works``: by the rank that orthogonalizes the matrix."""
        sends = {owner: work.momentum for owner, work in works.items() if self._sends(work, owner)}
        own = works.get(self._me)
        senders = dict(self._senders(own, self._me)) if own is not None else {}
        received = self._exchange(sends, {rank: _numel(box) for rank, box in senders.items()})
        results: dict[int, Tensor] = {}
        if own is not None:
            whole = own.momentum.new_empty(own.param.shape)
            for rank, box in senders.items():
                whole[box] = received[rank].view(whole[box].shape)
            update = own.orthogonalized(whole)
            results = {rank: update[box] for rank, box in enumerate(self._boxes[own.param])}
        sizes = {owner: work.momentum.numel() for owner, work in works.items()}
        for owner, update in self._exchange(results, sizes).items():
            works[owner].apply(update.view(works[owner].momentum.shape))

    def _sends(self, work: _Work, owner: int) -> bool:
        return any(rank == self._me for rank, _ in self._senders(work, owner))

    def _exchange(self, sends: dict[int, Tensor], sizes: dict[int, int]) -> dict[int, Tensor]:
        """Send a bf16 tensor to each of some ranks, and receive ``sizes`` elements from each of some."""
        ranks = range(len(self._ranks))
        device = self._device
        parts = [sends[rank].flatten() for rank in ranks if rank in sends]
        out = torch.cat(parts) if parts else torch.empty(0, dtype=torch.bfloat16, device=device)
        into = torch.empty(sum(sizes.values()), dtype=torch.bfloat16, device=device)
        # As bytes: not every backend has bf16 here.
        dist.all_to_all_single(
            into.view(torch.uint8),
            out.view(torch.uint8),
            [BF16_BYTES * sizes.get(rank, 0) for rank in ranks],
            [BF16_BYTES * (sends[rank].numel() if rank in sends else 0) for rank in ranks],
            group=self._group,
        )
        found = into.split([sizes.get(rank, 0) for rank in ranks])
        return {rank: found[rank] for rank in ranks if rank in sizes}

    @property
    def _device(self) -> torch.device:
        return local_part(next(iter(self._boxes))).device


def _numel(box: Box) -> int:
    return math.prod(side.stop - side.start for side in box)


def muon(
    groups: list[dict[str, Any]],
    *,
    lr: float,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    fused: bool | None = None,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    adjust_lr_fn: str = "match_rms_adamw",
) -> dict[str, torch.optim.Optimizer]:
    """Return Muon for the groups of hidden matrices, and AdamW (``betas``, ``eps``, ``fused``) for others."""
    matrices = [group for group in groups if group["hidden"]]
    rest = [group for group in groups if not group["hidden"]]
    for group in groups:
        del group["hidden"]
    found: dict[str, torch.optim.Optimizer] = {}
    if matrices:
        found["muon"] = Muon(
            matrices,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            ns_steps=ns_steps,
            adjust_lr_fn=adjust_lr_fn,
        )
    if rest:
        found["adamw"] = torch.optim.AdamW(
            rest, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, fused=fused
        )
    return found


PLUGIN = muon
