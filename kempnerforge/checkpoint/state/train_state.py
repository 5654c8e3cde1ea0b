"""``TrainState``: model, optimizers, extras, counters, data position and random number generators."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from kempnerforge.checkpoint.format import json_values, paths
from kempnerforge.checkpoint.results import Payload
from kempnerforge.checkpoint.state import rng_state
from kempnerforge.checkpoint.state.extra_state import Extras, digest_of
from kempnerforge.checkpoint.state.model_state import ModelState
from kempnerforge.checkpoint.state.optimizer_state import OptimizerState, check_whole, init_optimizer_state
from kempnerforge.checkpoint.state.tensor_leaves import Packer

MODEL, OPTIMIZER, OPTIMIZERS = paths.MODEL_PREFIX, "optimizer.", "optimizers."
Optimizers = torch.optim.Optimizer | Mapping[str, torch.optim.Optimizer] | Sequence[torch.optim.Optimizer]


def rng_name(rank: int) -> str:
    """Return the name of one rank's generators in a checkpoint."""
    return f"rng.rank_{rank:05d}"


class TrainState:
    """The state that a save writes and a resume restores.

    A resume restores everything exactly. For a value that cannot be restored, the constructor or
    the first save raises TypeError or ValueError, which names the value.

    Args:
        model: a module, or a sequence of modules (such as the stages of a pipeline rank) with
            distinct names. Prefixes of ``torch.compile`` and ``DistributedDataParallel`` are
            removed from names.
        optimizer: one ``torch.optim.Optimizer``, or a dict name -> optimizer, or a list, whose
            names are the positions. Everything in ``state`` and ``param_groups`` is stored. A
            resume creates the state that the checkpoint has, so no dummy step is needed before.
        extra: name -> any object with ``state_dict()`` and ``load_state_dict()``: a scheduler, a
            loader, an averaged model, a gradient scaler.
        per_rank: names of extras that have a separate state on each rank.
        hyperparameters: ``"checkpoint"`` restores all keys of ``param_groups``, as torch's
            ``load_state_dict`` does. A collection of keys keeps these as the program has them, and
            restores the others.
        device: the device of this rank. Default: that of the first parameter.
        seed: for random numbers that a resume cannot restore because the layout differs.
        fingerprint: identifies the data. A checkpoint of other data is refused.
        scheduler: description of the learning rate schedule. It is only recorded: the position in
            the schedule is ``step``.
        cursor: position in the data, a dataclass or mapping of JSON values. ``advance`` replaces
            it.
        batch_digest: returns the digest of the batch at a cursor, which a resume compares.
        groups: only if a rank has a part of the model: the ``name`` of each group -> the names of
            its parameters in the whole model.
        rng_stream: ranks with the same number get the same random numbers where a resume cannot
            restore them. Default: the rank.
    """

    @torch.inference_mode(False)  # state made here outlives an inference mode of the caller
    def __init__(
        self,
        *,
        model: nn.Module | Sequence[nn.Module],
        optimizer: Optimizers,
        extra: Mapping[str, Any] | None = None,
        per_rank: Collection[str] = (),
        hyperparameters: str | Collection[str] = "checkpoint",
        device: torch.device | None = None,
        seed: int = 0,
        fingerprint: Mapping[str, Any] | None = None,
        scheduler: Mapping[str, Any] | None = None,
        cursor: Any = None,
        batch_digest: Callable[[Mapping[str, Any]], str] | None = None,
        groups: Mapping[str, Sequence[str]] | None = None,
        rng_stream: int | None = None,
    ) -> None:
        if isinstance(hyperparameters, str) and hyperparameters != "checkpoint":
            raise ValueError(
                f'hyperparameters={hyperparameters!r}: use "checkpoint", or a collection of keys of '
                "param_groups"
            )
        self.model = ModelState(model)
        self.extras = Extras(extra, per_rank)
        kept = None if isinstance(hyperparameters, str) else frozenset(hyperparameters)
        self.groups = groups
        self.several_optimizers = not isinstance(optimizer, torch.optim.Optimizer)
        self.optimizers = {
            prefix: OptimizerState(given, prefix=prefix, groups=groups, kept=kept)
            for prefix, given in _by_prefix(optimizer).items()
        }
        """By the prefix of their names in a checkpoint."""
        all_given = [wrapped.optimizer for wrapped in self.optimizers.values()]
        for given in all_given:
            check_whole(given, all_given)
            init_optimizer_state(given)
        _check_kept(kept, all_given, self.extras.objects)
        self.model.check_stored(
            p for given in all_given for group in given.param_groups for p in group["params"]
        )
        self.device = device or _first_device(self.model.parts)
        self.seed = seed
        self.rng_stream = rng_stream
        self.fingerprint = dict(fingerprint or {})
        self.scheduler = dict(scheduler or {})
        self._batch_digest = batch_digest
        self.step = 0
        """Optimizer steps done, including skipped ones."""
        self.tokens = 0
        """Tokens trained on, over all ranks."""
        self.skipped_steps = 0
        """Steps whose update was skipped because of values that were not finite."""
        self.skipped_in_a_row = 0
        self.cursor = _cursor_json(cursor)
        """Position in the data, as JSON; empty without one."""
        self._pack_optimizers(Packer(), {})  # raise its errors here, not at the first save

    def advance(self, *, tokens: int = 0, cursor: Any = None, skipped: bool = False) -> None:
        """Count one step. ``tokens``: those of all ranks. ``cursor``: the data position after its batch."""
        self.step += 1
        self.tokens += tokens
        if cursor is not None:
            self.cursor = _cursor_json(cursor)
        self.skipped_steps += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0

    def next_digest(self) -> str | None:
        """Return the digest of the next batch, which proves that a resume continues with the correct data."""
        return self._batch_digest(self.cursor) if self._batch_digest is not None else None

    # -- save --------------------------------------------------------------------------------------------

    def capture(self, *, rank: int = 0, num_ranks: int = 1, overlapping: bool = False) -> Payload:
        """Return what this rank saves. Tensors are references, other values are copies.

        ``overlapping``: also copy buffers, which a forward during the save may change. Consumes no
        random numbers. Raises TypeError or ValueError, which names the value, for a value that
        cannot be restored.
        """
        generators = rng_state.capture(self.device)
        packer, objects = Packer(), self._counters()
        same: dict[str, str] = {}
        for name, value in self.model.entries(copy_buffers=overlapping).items():
            if isinstance(value, torch.Tensor):
                packer.add(MODEL + name, value)
            else:
                objects[MODEL + name] = packer.pack(value, name=MODEL + name)
                if num_ranks > 1:
                    same[MODEL + name] = digest_of(objects[MODEL + name], packer.tensors)
        tables = self._pack_optimizers(packer, objects)
        if num_ranks > 1:
            same |= self._digests(tables, packer, objects)
        plain = frozenset(n for n, t in packer.tensors.items() if not isinstance(t, DTensor))
        same |= self.extras.pack(packer, objects, rank=rank, num_ranks=num_ranks)
        # state_dict() of a loader may draw random numbers. A save must not change the next ones.
        if self.extras.objects and not torch.equal(rng_state.capture(self.device), generators):
            rng_state.restore(generators, self.device)
        packer.add(rng_name(rank), generators)
        frozen = packer.tensors.keys() & {MODEL + name for name in self.model.frozen()}
        if num_ranks == 1:
            return Payload(packer.tensors, objects, frozen=frozenset(frozen))
        lowest = plain - self.model.replicated()
        return Payload(packer.tensors, objects, same, from_lowest_rank=lowest, frozen=frozenset(frozen))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the model and optimizer tensors by checkpoint name, as references."""
        entries = self.model.entries()
        packer = Packer()
        packer.tensors.update({MODEL + n: t for n, t in entries.items() if isinstance(t, torch.Tensor)})
        self._pack_optimizers(packer, {})
        return packer.tensors

    def _pack_optimizers(self, packer: Packer, objects: dict[str, Any]) -> dict[str, Any]:
        """Add all optimizers to ``packer`` and ``objects``. Return prefix -> description of its groups."""
        names = self.model.names()
        tables = {prefix: opt.pack(names, packer, objects) for prefix, opt in self.optimizers.items()}
        if self.several_optimizers:
            objects["optimizers"] = {prefix.split(".")[1]: table for prefix, table in tables.items()}
        else:
            objects["optimizer"] = tables[OPTIMIZER]
        return tables

    def _digests(
        self, tables: Mapping[str, Any], packer: Packer, objects: Mapping[str, Any]
    ) -> dict[str, str]:
        """Return digests of what must be the same on all ranks, because only one rank stores it.

        These are the groups of the optimizers and, if every rank has all parameters, the state that
        is not tensors.
        """
        tensors = packer.tensors
        found = {f"{prefix}groups": digest_of(table["groups"], tensors) for prefix, table in tables.items()}
        for prefix in tables if self.groups is None else ():
            others = {name: value for name, value in objects.items() if name.startswith(prefix)}
            if others:
                found[f"{prefix}state"] = digest_of(others, tensors)
        return found

    def _counters(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "tokens": self.tokens,
            "samples": self.cursor.get("samples"),
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "seed": self.seed,
            "data": json_values.encode(
                {
                    "cursor": self.cursor,
                    "fingerprint": self.fingerprint,
                    "next_digest": self.next_digest(),
                },
                name="data",
            ),
            "scheduler": json_values.encode(self.scheduler, name="scheduler"),
        }

    # -- load --------------------------------------------------------------------------------------------

    def load_objects(self, objects: Mapping[str, Any], *, scheduler: bool = True, data: bool = True) -> None:
        """Load counters from a checkpoint.

        ``scheduler``: load the step counter, which determines the learning rate. ``data``: load the
        cursor.
        """
        if scheduler:
            self.step = objects["step"]
            self.tokens = objects["tokens"]
            self.skipped_steps = objects["skipped_steps"]
            self.skipped_in_a_row = objects["skipped_in_a_row"]
        if data:
            self.cursor = dict(objects["data"]["cursor"])


def _by_prefix(optimizer: Optimizers) -> dict[str, torch.optim.Optimizer]:
    if isinstance(optimizer, torch.optim.Optimizer):
        return {OPTIMIZER: optimizer}
    if isinstance(optimizer, Mapping):
        named: dict[Any, Any] = dict(optimizer)
    elif isinstance(optimizer, (list, tuple)):
        named = {str(position): given for position, given in enumerate(optimizer)}
    else:
        raise TypeError(
            "optimizer= takes torch.optim.Optimizer, or a dict or list of them, not "
            f"{type(optimizer).__name__}"
        )
    for name in named:
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"optimizer={{{name!r}: ...}}: a name is a string without dots")
    return {f"{OPTIMIZERS}{name}.": given for name, given in named.items()}


def _check_kept(
    kept: Collection[str] | None, optimizers: Sequence[torch.optim.Optimizer], extras: Mapping[str, Any]
) -> None:
    """Raise ValueError for hyperparameters that no group has, or that a scheduler sets."""
    known = {key for given in optimizers for group in given.param_groups for key in group}
    if unknown := sorted(set(kept or ()) - known):
        raise ValueError(f"hyperparameters= names {unknown[0]!r}, which no group of optimizer= has")
    for name, extra in extras.items():
        if "lr" in (kept or ()) and isinstance(extra, torch.optim.lr_scheduler.LRScheduler):
            raise ValueError(
                f"hyperparameters= keeps lr, but the scheduler extra[{name!r}] continues from it: remove lr"
            )


def _first_device(parts: Sequence[nn.Module]) -> torch.device:
    for part in parts:
        for tensor in (*part.parameters(), *part.buffers()):
            return tensor.device
    return torch.device("cpu")


def _cursor_json(cursor: object) -> dict[str, Any]:
    if dataclasses.is_dataclass(cursor) and not isinstance(cursor, type):
        return dataclasses.asdict(cursor)
    if cursor is not None and not isinstance(cursor, Mapping):
        raise TypeError(f"cursor= takes a dataclass or a mapping, not {type(cursor).__name__}")
    return dict(cast("Mapping[str, Any]", cursor or {}))
