"""The loss of a run: ``train.loss`` and ``train.z_loss``, for every layout."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from kempnerforge.config.plugin_uses import head_issues, z_loss_issues
from kempnerforge.config.schema import DistributedConfig, TrainConfig
from kempnerforge.data.rows import IGNORED
from kempnerforge.distributed.consensus import mark_collective
from kempnerforge.errors import ConfigError, ConfigIssue
from kempnerforge.plugins import resolve
from kempnerforge.train.losses.chunked_cross_entropy import chunked_cross_entropy
from kempnerforge.train.losses.cross_entropy import cross_entropy
from kempnerforge.train.micro_batch import MicroBatch
from kempnerforge.train.z_loss import z_loss


class LossSums(NamedTuple):
    """Sums over the tokens of a forward pass, in fp32."""

    total: Tensor
    """What the backward pass begins with, []. Its gradient is that of loss and z-loss."""
    reported: Tensor
    """The loss, []. With a z-loss: the loss without it, and the z-loss, [2]. It has no gradient."""
    rows: Tensor | None = None
    """The loss of each row without the z-loss, [B]. Of consecutive rows of one source, the first may
    have the loss of all, and the others 0. None without sources. It has no gradient."""

    def __truediv__(self, divisor: float | Tensor) -> LossSums:
        """Return the sums over all tokens, divided by ``divisor``, and those of the rows as they are."""
        return LossSums(self.total / divisor, self.reported / divisor, self.rows)


@dataclass
class Loss:
    """A function of logits and targets, or of hidden states, targets and the weight of the output layer.

    A function of hidden states has an attribute ``takes_hidden = True``. The model computes it in
    its forward pass, in place of the output layer, so that FSDP has the weight gathered.
    """

    function: Callable[..., Any] = cross_entropy
    args: Mapping[str, Any] = field(default_factory=dict)
    z_loss: float = 0.0
    """Coefficient of the z-loss. 0 disables it."""
    name: str = "cross_entropy"
    is_built_in: bool = False
    """Whether the function is one of KempnerForge's own, and need not be tried."""
    _weight: Tensor | None = field(default=None, init=False, repr=False)
    _is_checked: bool = field(default=False, init=False, repr=False)

    @property
    def takes_hidden(self) -> bool:
        """Whether it takes hidden states instead of logits."""
        return getattr(self.function, "takes_hidden", False)

    def without_z_loss(self) -> Loss:
        """Return the loss of a validation."""
        return dataclasses.replace(self, z_loss=0.0)

    def check_model(self, model: nn.Module) -> None:
        """Raise ConfigError if ``model`` does not offer its hidden states to a loss that needs them."""
        if self.takes_hidden and (issues := head_issues(self.name, model.forward, type(model).__name__)):
            raise ConfigError(issues)

    def check_function(self, *, with_ignored: bool) -> None:
        """Try the function on a few logits, once: its result, and targets of which one is ``IGNORED``.

        Raises ConfigError on all ranks if it returns a mean or anything but a tensor [], and with
        ``with_ignored`` also if it raises an exception for that target, or counts it. A function that
        cannot be tried on 8 small logits is left to its first step.
        """
        if self.is_built_in or self._is_checked:
            return
        self._is_checked = True
        size = 8
        values = torch.linspace(-1, 1, 2 * size).unflatten(0, (1, 2, size))
        weight = [torch.eye(size)] if self.takes_hidden else []
        options = {**self.args, **({"z_loss": self.z_loss} if weight and self.z_loss else {})}

        def loss_of(*targets: int, start: int = 0) -> Tensor:
            logits = values[:, start : start + len(targets)]
            found = self.function(logits, torch.tensor([targets]), *weight, **options)
            return self._sum(found[0] if isinstance(found, tuple) else found)

        problem = None
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            try:
                both, expected = loss_of(3, 1), loss_of(3)
                total = expected + loss_of(1, start=1)
                is_sum = torch.allclose(both, total, rtol=1e-4)
                if not is_sum and torch.allclose(2 * both, total, rtol=1e-4):
                    problem, hint = f"{self.name} returned a mean", 'return the sum: reduction="sum"'
                    raise ConfigError([ConfigIssue("train.loss", problem, hint)])
            except ConfigError as error:
                raise mark_collective(error) from None
            except Exception:  # noqa: BLE001 - the user's code may raise anything
                return
            if with_ignored:
                try:
                    counts = not torch.allclose(loss_of(3, IGNORED), expected, rtol=1e-4)
                    problem = "counts it" if counts else None
                except Exception as error:  # noqa: BLE001
                    problem = f"raises {type(error).__name__}: {error}"
        if problem:
            problem = f"targets of {IGNORED} count nothing, but {self.name} {problem}"
            hint = "leave such targets out of its sum: docs/guide/losses.md"
            raise mark_collective(ConfigError([ConfigIssue("train.loss", problem, hint)]))

    def __call__(self, model: nn.Module, rows: MicroBatch) -> LossSums:
        """Run ``model`` on ``rows``, and compute its loss."""
        if not self.takes_hidden:
            output = model(rows.inputs_BT, **rows.forward_options)
            return self.of_output(output, rows.targets_BT, rows.sources)

        def head(hidden: Tensor, weight: Tensor) -> LossSums:
            return self._of_hidden(hidden, rows.targets_BT, weight, rows.sources)

        return model(rows.inputs_BT, head=head, **rows.forward_options)

    @property
    def forward_options(self) -> dict[str, Any]:
        """Keyword arguments for the forward pass of a last stage whose output is given to ``of_output``."""
        return {"head": self._keep_weight} if self.takes_hidden else {}

    def of_output(self, output: Tensor, targets_BT: Tensor, sources: Sequence[int] | None = None) -> LossSums:
        """Compute the loss of logits, or of the hidden states of a stage with ``forward_options``.

        ``sources`` are those of the rows, to compute the loss of each. A stage's weights are
        gathered from its first forward pass to its last backward pass.
        """
        if self.takes_hidden:
            assert self._weight is not None
            return self._of_hidden(output, targets_BT, self._weight, sources)

        def compute(output: Tensor, targets_BT: Tensor) -> LossSums:
            loss = self._sum(self.function(output, targets_BT, **self.args))
            return _sums(loss, z_loss(output, targets_BT, self.z_loss) if self.z_loss else None)

        return _of_sources(compute, output, targets_BT, sources)

    def _keep_weight(self, hidden: Tensor, weight: Tensor) -> Tensor:
        self._weight = weight
        return hidden

    def _of_hidden(
        self, hidden: Tensor, targets_BT: Tensor, weight: Tensor, sources: Sequence[int] | None
    ) -> LossSums:
        if isinstance(weight, DTensor) and weight.device_mesh.mesh_dim_names != ("tp",):
            problem = f'"{self.name}" needs the whole output weight, but FSDP has sharded it'
            hint = "leave the output layer out of fsdp_units()"
            raise ConfigError([ConfigIssue("train.loss", problem, hint)])
        if isinstance(hidden, DTensor):
            hidden = hidden.redistribute(placements=[Replicate()])
        options = {**self.args, **({"z_loss": self.z_loss} if self.z_loss else {})}
        if sources is not None and self.function is chunked_cross_entropy:
            # One call for all rows: each keeps a gradient of the output weight for the backward pass.
            loss, z, rows = chunked_cross_entropy(hidden, targets_BT, weight, row_losses=True, **options)
            return _sums(loss, z if self.z_loss else None)._replace(rows=rows)

        def compute(hidden: Tensor, targets_BT: Tensor) -> LossSums:
            found = self.function(hidden, targets_BT, weight, **options)
            if not self.z_loss:
                return _sums(self._sum(found[0] if isinstance(found, tuple) else found), None)
            if not isinstance(found, tuple):
                raise TypeError(f"{self.name} has an argument z_loss, so it must return (loss, z-loss)")
            return _sums(self._sum(found[0]), self._sum(found[1]))

        return _of_sources(compute, hidden, targets_BT, sources)

    def _sum(self, loss: Any) -> Tensor:
        """Return what the function returned as a plain tensor, []. Raises ConfigError for anything else."""
        if not isinstance(loss, Tensor) or loss.dim():
            problem = f"{self.name} returned {described(loss)}"
            hint = "a loss is the sum over all tokens, a tensor []"
            raise ConfigError([ConfigIssue("train.loss", problem, hint)])
        return loss.full_tensor() if isinstance(loss, DTensor) else loss


def _of_sources(
    compute: Callable[[Tensor, Tensor], LossSums],
    values: Tensor,
    targets_BT: Tensor,
    sources: Sequence[int] | None,
) -> LossSums:
    """Return what ``compute`` returns for ``values`` [B, T, ...], with the loss of each source if given.

    It is called for each run of rows of the same source.
    """
    if sources is None:
        return compute(values, targets_BT)
    lengths = [len(list(run)) for _, run in itertools.groupby(sources)]
    runs = zip(values.split(lengths), targets_BT.split(lengths), strict=True)
    parts = [compute(*run) for run in runs]
    rows = [
        F.pad(part.reported.reshape(-1)[:1], (0, length - 1))
        for part, length in zip(parts, lengths, strict=True)
    ]
    total = torch.stack([part.total for part in parts]).sum(0)
    return LossSums(total, torch.stack([part.reported for part in parts]).sum(0), torch.cat(rows))


def described(value: Any) -> str:
    """Return what a function of the user's returned, for a message."""
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _sums(loss: Tensor, z: Tensor | None) -> LossSums:
    if z is None:
        return LossSums(loss, loss.detach())
    # The gradient of a loss of hidden states may contain that of the z-loss already.
    total = loss + z if z.requires_grad else loss
    return LossSums(total, torch.stack([loss.detach(), z.detach()]))


def build_loss(train: TrainConfig, distributed: DistributedConfig) -> Loss:
    """Return the loss of a run. Raises ConfigError."""
    plugin = resolve("loss", train.loss, key="train.loss")
    if issues := z_loss_issues(plugin, train.z_loss):
        raise ConfigError(issues)
    args = dict(train.loss_args)
    if train.chunk_tokens is not None:
        args["recompute"] = train.loss_is_recomputed(distributed.pp_schedule)
    return Loss(plugin.target, args, train.z_loss, train.loss, plugin.is_built_in)
