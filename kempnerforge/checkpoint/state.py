"""Model, optimizer, generators and position in the data as one tree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kempnerforge.checkpoint import layout, rng
from kempnerforge.checkpoint.optimizer_state import make_state

MODEL, OPTIMIZER = layout.MODEL_PREFIX, "optimizer."


def rng_name(rank: int) -> str:
    """Name of one rank's generators in a checkpoint."""
    return f"rng.rank_{rank:05d}"


class TrainState:
    """Everything that a run needs to go on where it was.

    Tensors are handed out by reference, so that loading fills them in place. Adam's and AdamW's state is made
    here if it does not exist, because making it later would change the tree. ``model`` may be several parts
    of one, as a pipeline's rank holds them; ``groups`` then has the names of the whole model's parameters by
    the ``name`` of the optimizer's group, so that every rank stores the same.
    """

    def __init__(
        self,
        *,
        model: nn.Module | Sequence[nn.Module],
        optimizer: torch.optim.Optimizer,
        device: torch.device | None = None,
        seed: int = 0,
        fingerprint: Mapping[str, Any] | None = None,
        scheduler: Mapping[str, Any] | None = None,
        cursor: Any = None,
        batch_digest: Callable[[Mapping[str, Any]], str] | None = None,
        groups: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        make_state(optimizer)
        self.parts = (model,) if isinstance(model, nn.Module) else tuple(model)
        """What this rank holds of the model: all of it, or its stages of a pipeline."""
        self.optimizer = optimizer
        self._groups = groups
        self.device = device or next(self.parts[0].parameters()).device
        self.seed = seed
        self.fingerprint = dict(fingerprint or {})
        """What the data is; a checkpoint of other data is refused."""
        self.scheduler = dict(scheduler or {})
        """Description of the schedule; its position is ``step``."""
        self._batch_digest = batch_digest
        self.step = 0
        """Optimizer steps done, skipped ones included."""
        self.tokens = 0
        """Tokens trained on, all ranks."""
        self.skipped_steps = 0
        """Steps whose update was skipped because something was not finite."""
        self.skipped_in_a_row = 0
        self.cursor = _cursor_json(cursor)
        """Position in the data, as JSON."""

    def advance(self, *, tokens: int = 0, cursor: Any = None, skipped: bool = False) -> None:
        """Count one step: its tokens (all ranks) and the cursor behind its batch, if there is one."""
        self.step += 1
        self.tokens += tokens
        if cursor is not None:
            self.cursor = _cursor_json(cursor)
        self.skipped_steps += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0

    def next_digest(self) -> str | None:
        """Digest of the batch that comes next: the proof that a resume goes on in the data."""
        return self._batch_digest(self.cursor) if self._batch_digest is not None else None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Model and optimizer tensors by checkpoint name, by reference."""
        found = {MODEL + name: t for part in self.parts for name, t in part.state_dict().items()}
        for parameter, name in self._names().items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    found[f"{OPTIMIZER}state.{name}.{key}"] = value
        return found

    def names_elsewhere(self) -> set[str]:
        """Names of the tensors that only other ranks hold: those of other stages of a pipeline."""
        if self._groups is None:
            return set()
        mine = set(self._names().values())
        others = {name for group in self._groups.values() for name in group} - mine
        keys = {key for state in self.optimizer.state.values() for key in state}
        moments = {f"{OPTIMIZER}state.{name}.{key}" for name in others for key in keys}
        return {MODEL + name for name in others} | moments

    def _names(self) -> dict[torch.Tensor, str]:
        return {parameter: name for part in self.parts for name, parameter in part.named_parameters()}

    def capture_rng(self) -> torch.Tensor:
        """This rank's generators, uint8."""
        return rng.capture(self.device)

    def objects(self) -> dict[str, Any]:
        """What is no tensor: the content of ``train_state.json``."""
        names = self._names()
        groups = [
            {
                **{key: value for key, value in group.items() if key != "params"},
                "params": list(self._groups[group["name"]])
                if self._groups is not None
                else [names[parameter] for parameter in group["params"]],
            }
            for group in self.optimizer.param_groups
        ]
        return {
            "step": self.step,
            "tokens": self.tokens,
            "samples": self.cursor.get("samples"),
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "seed": self.seed,
            "data": {
                "cursor": self.cursor,
                "fingerprint": self.fingerprint,
                "next_digest": self.next_digest(),
            },
            "scheduler": self.scheduler,
            "optimizer": {"groups": groups},
        }

    def load_objects(self, objects: Mapping[str, Any], *, scheduler: bool = True, data: bool = True) -> None:
        """Take counters from a checkpoint.

        ``scheduler`` stands for the step counter, which the learning rate follows; ``data`` for the cursor.
        Hyperparameters are the config's: the receipt tells what changed.
        """
        if scheduler:
            self.step = objects["step"]
            self.tokens = objects["tokens"]
            self.skipped_steps = objects["skipped_steps"]
            self.skipped_in_a_row = objects["skipped_in_a_row"]
        if data:
            self.cursor = dict(objects["data"]["cursor"])


def _cursor_json(cursor: object) -> dict[str, Any]:
    if dataclasses.is_dataclass(cursor) and not isinstance(cursor, type):
        return dataclasses.asdict(cursor)
    return dict(cursor) if isinstance(cursor, Mapping) else {}
