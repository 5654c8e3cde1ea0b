"""Extras: user objects that a checkpoint stores, such as schedulers, loaders, averaged models.

The extra NAME is the entry ``extra.NAME`` of ``train_state.json``. The names of its tensors begin
with ``extra.NAME.``. An extra with a separate state on each rank has entries such as
``extra.NAME.rank_00003``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash
from torch.distributed.tensor import DTensor

from kempnerforge.checkpoint.format.dtypes import DTYPES
from kempnerforge.checkpoint.state.stored_step import StoredStep
from kempnerforge.checkpoint.state.tensor_leaves import (
    SMALL_BYTES,
    Packer,
    Unpacker,
    tensor_names,
    tensor_tags,
)
from kempnerforge.errors import MismatchError

PREFIX = "extra."
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_ENTRY = re.compile(r"extra\.([A-Za-z0-9_-]+)(?:\.rank_(\d{5}))?")


class Extras:
    """Objects with ``state_dict()`` and ``load_state_dict()``, by name.

    Raises TypeError or ValueError, which names the extra, for an object without these methods, for
    a name with characters other than letters, digits, ``_`` and ``-``, and for a name in
    ``per_rank`` that is not an extra.
    """

    def __init__(self, extra: Mapping[str, Any] | None, per_rank: Collection[str]) -> None:
        if not isinstance(extra or {}, Mapping):
            raise TypeError(f"extra= takes a dict from names to objects, not a {type(extra).__name__}")
        self.objects = dict(extra or {})
        if isinstance(per_rank, str):
            raise TypeError(f"per_rank= takes a collection of names: ({per_rank!r},)")
        self.per_rank = frozenset(per_rank)
        for name, value in self.objects.items():
            if not isinstance(name, str) or _NAME.fullmatch(name) is None:
                raise ValueError(f"extra={{{name!r}: ...}}: a name consists of letters, digits, _ and -")
            for method in ("state_dict", "load_state_dict"):
                if isinstance(value, type):
                    raise TypeError(f"extra[{name!r}] is the class {value.__qualname__}: pass an instance")
                if not callable(getattr(value, method, None)):
                    raise TypeError(f"extra[{name!r}] is a {type(value).__qualname__} without {method}()")
        if unknown := sorted(self.per_rank - self.objects.keys()):
            raise ValueError(f"per_rank= names {unknown[0]!r}, which is not in extra=")

    def _entry(self, name: str, rank: int) -> str:
        return f"{PREFIX}{name}.rank_{rank:05d}" if name in self.per_rank else f"{PREFIX}{name}"

    def pack(self, packer: Packer, objects: dict[str, Any], *, rank: int, num_ranks: int) -> dict[str, str]:
        """Add all states to ``packer`` and ``objects``.

        Returns what must be the same on all ranks: ``extra.NAME`` -> digest of the state, or "per
        rank".
        """
        digests: dict[str, str] = {}
        for name, value in self.objects.items():
            entry = self._entry(name, rank)
            objects[entry] = packer.pack(value.state_dict(), name=entry)
            if name in self.per_rank and any(
                tag.get("sharded") for tag in tensor_tags(objects[entry]).values()
            ):
                raise TypeError(f"{entry} holds a DTensor, which all ranks share: remove it from per_rank=")
            if num_ranks > 1:
                shared = name not in self.per_rank
                digests[PREFIX + name] = digest_of(objects[entry], packer.tensors) if shared else "per rank"
        return digests

    def targets(
        self,
        reader: StoredStep,
        *,
        rank: int,
        num_ranks: int,
        excluded: Collection[str],
        device: torch.device,
    ) -> ExtraTargets:
        """Return what a load has to read, and where to put it.

        Raises MismatchError for an extra that only the checkpoint or only the program has, and for
        one that was saved for another number of ranks, unless it is in ``excluded``.
        """
        found = ExtraTargets()
        stored = stored_extras(reader.raw_objects)
        for name in sorted({*stored, *self.objects}):
            if name in excluded:
                found.excluded.append(name)
                continue
            self._check(name, stored.get(name), num_ranks, reader)
            entry, target = self._entry(name, rank), self.objects[name]
            encoded = reader.raw_objects[entry]
            unpacker = like_present(target.state_dict, entry, encoded, reader, device)
            value = unpacker.unpack(encoded)
            found.tensors |= unpacker.tensors
            found.loads[name] = (target.load_state_dict, value)
            if isinstance(value, dict) and not value:
                found.empty.add(name)
        return found

    def _check(self, name: str, ranks: set[int] | None, num_ranks: int, reader: StoredStep) -> None:
        way_out = f'exclude it with CheckpointConfig(exclude_from_loading=["{PREFIX}{name}"])'
        if ranks is None:
            raise MismatchError(f"{reader.path} has no {PREFIX}{name}, which this program has; {way_out}")
        if name not in self.objects:
            raise MismatchError(f"{reader.path} has {PREFIX}{name}, which this program lacks; {way_out}")
        if bool(ranks) != (name in self.per_rank):
            there, here = ("for each rank", "for all ranks") if ranks else ("for all ranks", "for each rank")
            raise MismatchError(f"{PREFIX}{name} was saved once {there}, but is {here} here; {way_out}")
        if ranks and ranks != set(range(num_ranks)):
            raise MismatchError(
                f"{PREFIX}{name} has a separate state on each rank, of {len(ranks)} ranks in "
                f"{reader.path}, but there are {num_ranks} here; {way_out}"
            )


@dataclass
class ExtraTargets:
    """What a load reads for all extras, and where to put it."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    loads: dict[str, tuple[Callable[[Any], object], Any]] = field(default_factory=dict)
    """Name -> method to call, and its argument, whose tensors a load fills."""
    empty: set[str] = field(default_factory=set)
    """Names in ``loads`` whose state is empty."""
    excluded: list[str] = field(default_factory=list)

    def apply(self) -> None:
        """Call ``load_state_dict`` of every extra."""
        for load, value in self.loads.values():
            load(value)


def stored_extras(objects: Mapping[str, Any]) -> dict[str, set[int]]:
    """Return name -> ranks with a separate state; an empty set if all ranks share one."""
    found: dict[str, set[int]] = {}
    for entry in objects:
        if match := _ENTRY.fullmatch(entry):
            ranks = found.setdefault(match[1], set())
            if match[2]:
                ranks.add(int(match[2]))
    return found


def digest_of(encoded: Any, tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a digest of a state as JSON, and of its small CPU tensors.

    Larger tensors are stored from one rank.
    """
    digest = xxhash.xxh3_128(json.dumps(encoded, sort_keys=True).encode())
    for name in sorted(tensor_names(encoded)):
        tensor = tensors[name]
        digest.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        if not isinstance(tensor, DTensor) and tensor.device.type == "cpu" and tensor.nbytes <= SMALL_BYTES:
            digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def like_present(
    present: Callable[[], Any], entry: str, encoded: Any, reader: StoredStep, device: torch.device
) -> Unpacker:
    """Return an unpacker that creates tensors like those that the program has in the same places.

    ``present`` returns the current value. It is called only if the checkpoint has tensors.
    """
    packer = Packer()
    if tensor_tags(encoded):
        packer.pack(present(), name=entry)
    return Unpacker(lambda name, tag: _target(name, tag, packer.tensors, reader, device))


def _target(
    name: str,
    tag: Mapping[str, Any],
    templates: Mapping[str, torch.Tensor],
    reader: StoredStep,
    device: torch.device,
) -> torch.Tensor:
    """Return a tensor like the current one, or, without one, on the device that it was saved from."""
    dtype, shape = reader.index.head(name)
    template = templates.get(name) if "dtype" not in tag else None  # a numpy array is filled on the CPU
    if template is not None and tuple(template.shape) == shape:
        return torch.empty_like(template, dtype=DTYPES[dtype], requires_grad=False)
    if tag.get("sharded"):
        raise MismatchError(
            f"{name} was saved from a sharded tensor of shape {shape}; before the resume, create a tensor of "
            "this shape in the object, sharded as it should be here"
        )
    where = device if tag.get("device") == device.type else torch.device("cpu")
    return torch.empty(shape, dtype=DTYPES[dtype], device=where)
