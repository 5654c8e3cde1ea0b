"""The loss of a run: ``train.loss`` and ``train.z_loss``, for every layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from kempnerforge.config.plugin_uses import head_issues, z_loss_issues
from kempnerforge.config.schema import DistributedConfig, TrainConfig
from kempnerforge.errors import ConfigError, ConfigIssue
from kempnerforge.plugins import resolve
from kempnerforge.train.losses.cross_entropy import cross_entropy
from kempnerforge.train.micro_batch import MicroBatch
from kempnerforge.train.z_loss import z_loss


class LossSums(NamedTuple):
    """Sums over the tokens of a forward pass, in fp32."""

    total: Tensor
    """What the backward pass begins with, []. Its gradient is that of loss and z-loss."""
    reported: Tensor
    """The loss, []. With a z-loss: the loss without it, and the z-loss, [2]. It has no gradient."""

    def __truediv__(self, factor: float) -> LossSums:
        """Return both, divided by ``factor``."""
        return LossSums(self.total / factor, self.reported / factor)


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
    _weight: Tensor | None = field(default=None, init=False, repr=False)

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

    def __call__(self, model: nn.Module, rows: MicroBatch) -> LossSums:
        """Run ``model`` on ``rows``, and compute its loss."""
        inputs_BT, targets_BT, options = rows.inputs_BT, rows.targets_BT, rows.forward_options
        if not self.takes_hidden:
            return self.of_output(model(inputs_BT, **options), targets_BT)
        return model(
            inputs_BT, head=lambda hidden, weight: self._of_hidden(hidden, targets_BT, weight), **options
        )

    @property
    def forward_options(self) -> dict[str, Any]:
        """Keyword arguments for the forward pass of a last stage whose output is given to ``of_output``."""
        return {"head": self._keep_weight} if self.takes_hidden else {}

    def of_output(self, output: Tensor, targets_BT: Tensor) -> LossSums:
        """Compute the loss of logits, or of the hidden states of a stage with ``forward_options``.

        A stage's weights are gathered from its first forward pass to its last backward pass.
        """
        if self.takes_hidden:
            assert self._weight is not None
            return self._of_hidden(output, targets_BT, self._weight)
        loss = _plain(self.function(output, targets_BT, **self.args))
        return _sums(loss, z_loss(output, targets_BT, self.z_loss) if self.z_loss else None)

    def _keep_weight(self, hidden: Tensor, weight: Tensor) -> Tensor:
        self._weight = weight
        return hidden

    def _of_hidden(self, hidden: Tensor, targets_BT: Tensor, weight: Tensor) -> LossSums:
        if isinstance(weight, DTensor) and weight.device_mesh.mesh_dim_names != ("tp",):
            problem = f'"{self.name}" needs the whole output weight, but FSDP has sharded it'
            hint = "leave the output layer out of fsdp_units()"
            raise ConfigError([ConfigIssue("train.loss", problem, hint)])
        if isinstance(hidden, DTensor):
            hidden = hidden.redistribute(placements=[Replicate()])
        z_option = {"z_loss": self.z_loss} if self.z_loss else {}
        found = self.function(hidden, targets_BT, weight, **self.args, **z_option)
        if not self.z_loss:
            return _sums(_plain(found[0] if isinstance(found, tuple) else found), None)
        if not isinstance(found, tuple):
            raise TypeError(f"{self.name} has an argument z_loss, so it must return (loss, z-loss)")
        return _sums(_plain(found[0]), _plain(found[1]))


def _plain(loss: Tensor) -> Tensor:
    return loss.full_tensor() if isinstance(loss, DTensor) else loss


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
    return Loss(plugin.target, args, train.z_loss, train.loss)
