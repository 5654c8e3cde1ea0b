"""The plan of a save that all ranks have agreed on, and its buffers; made anew if a rank's tensors change."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import xxhash

from kempnerforge.checkpoint import cuda
from kempnerforge.checkpoint.format import structure
from kempnerforge.checkpoint.format.structure import FLAT, Structure
from kempnerforge.checkpoint.results import Payload
from kempnerforge.checkpoint.save import host_memory
from kempnerforge.checkpoint.save.commit import ExpectedFiles, PlannedFile
from kempnerforge.checkpoint.save.host_buffers import HostBuffers, needed_bytes
from kempnerforge.checkpoint.save.plan import (
    SavePlan,
    Signature,
    digest_of,
    held_chunks,
    make_plan,
    signature_of,
)
from kempnerforge.checkpoint.save.union import Held, Union, unite
from kempnerforge.checkpoint.state.flatten import TreePayload
from kempnerforge.checkpoint.state.pieces import check_name
from kempnerforge.checkpoint.state.tensor_leaves import tensor_names
from kempnerforge.distributed.consensus import ControlGroup, mark_collective
from kempnerforge.errors import HostMemoryError, KempnerForgeError, SaveFailedError

log = logging.getLogger("kempnerforge.checkpoint.async_save")
"""Named after what users know."""

_DIGEST_BITS = (1 << 62) - 1
_HINTS = {
    "extra.": ": name it in per_rank=",
    "model.": ": keep it equal, or hand it over as extra= and name it in per_rank=",
    "optimizer": ": where a rank has a part of the model, give groups=, the same on all ranks",
}
"""By the beginning of a name: what to do when it differs between ranks."""
_SHOWN = 5
"""Names in an error."""


class SavePlanCache:
    """The plan of one state dict. A repeated save compares signatures and takes one small reduction.

    ``max_host_memory_gb``: a bound on the buffers of each machine; None for what there is.
    """

    def __init__(self, max_host_memory_gb: float | None = None) -> None:
        self._max_host_memory_gb = max_host_memory_gb
        self.device: torch.device | None = None
        """The CUDA device that this rank's tensors are on; None if they are in host memory."""
        self._made_for: torch.device | None = None
        self.arenas: HostBuffers | None = None
        self.expected: ExpectedFiles | None = None
        """What all ranks write; on the first rank only, which commits."""
        self.largest_bytes = 0
        """Host buffers of the rank that writes most: no rank gives a save up sooner than that one may."""
        self.contributed: frozenset[str] = frozenset()
        """Non-tensor leaves that only this rank has: the first rank gets their values from it."""
        self._structure: dict[str, Any] | None = None
        """The paths of the leaves of all ranks in a nested state dict, as JSON."""
        self._seen: tuple[Signature | None, tuple[str, ...], Structure] | None = None
        self._held = Held([])
        self._held_digest = ""
        self._agreed_digest = ""

    def update(self, payload: Payload) -> None:
        """Determine which chunks and leaves of ``payload`` this rank holds.

        Raises TypeError and ValueError for what cannot be stored.
        """
        self.device = cuda.device_of(payload.tensors)
        paths = payload.structure if isinstance(payload, TreePayload) else FLAT
        seen = (signature_of(payload.tensors), (*payload.objects, *payload.from_lowest_rank), paths)
        if seen[0] is not None and seen == self._seen:
            return
        self._seen = None
        self._held = _held(payload, paths)
        self._held_digest = digest_of(self._held)
        self._seen = seen

    def agree(
        self,
        control: ControlGroup,
        error: Exception | None,
        *,
        same: Mapping[str, str] | None = None,
    ) -> None:
        """Keep the plan, or make a new one and new buffers if any rank needs it.

        Collective: all ranks. ``error``: why this rank could not prepare its part; it is raised on all ranks
        as TypeError, ValueError or SaveFailedError, with rank and cause. ``same``: digests, by name, of what
        must be equal on all ranks; a difference is a ValueError on all ranks that names it.
        """
        number = xxhash.xxh3_64_intdigest(repr(sorted((same or {}).items())).encode()) & _DIGEST_BITS
        changed = self._held_digest != self._agreed_digest or self.device != self._made_for
        changed = self.arenas is None or changed
        failed, changed, highest, lowest = control.agree([error is not None, changed, number, -number])
        if failed:
            raise_on_all(control, error)
        if highest != -lowest:
            problem = _difference(control.gather(dict(same or {})))
            if problem is not None:
                raise mark_collective(problem)
        if changed:
            self._make(control)

    def _make(self, control: ControlGroup) -> None:
        everything = control.gather(self._held)
        plan, union = control.run_on_rank0(lambda: _plan_of_all(everything))
        self.release()
        self._make_buffers(control, plan.files[control.rank])
        self.expected = plan.expected if control.rank == 0 else None
        self.contributed = union.contributed[control.rank]
        self._structure = union.structure
        self._agreed_digest = self._held_digest

    def _make_buffers(self, control: ControlGroup, files: Sequence[PlannedFile]) -> None:
        """Make the buffers of ``files`` if all ranks' buffers fit. Collective: an error is raised on all."""
        error: Exception | None = None
        claim = None
        try:
            claim = host_memory.claim(needed_bytes(files))
        except Exception as found:  # noqa: BLE001 - told to all ranks in the agreement below
            error = _no_buffers(found)
        # All have looked before the first one takes any: what is free is free of these buffers.
        claims = control.gather(claim)
        if None in claims:
            raise_on_all(control, error)
        fault = host_memory.fault([one for one in claims if one is not None], self._max_host_memory_gb)
        if fault is not None:
            raise HostMemoryError(fault)
        try:
            self.arenas = HostBuffers(files, self.device)
        except Exception as found:  # noqa: BLE001 - told to all ranks in the agreement below
            error = _no_buffers(found)
        unpinned = self.arenas.pin_error if self.arenas is not None else ""
        size_bytes = self.arenas.size_bytes if self.arenas is not None else 0
        failed, some_unpinned, largest = control.agree([error is not None, bool(unpinned), size_bytes])
        if failed:
            self.release()
            raise_on_all(control, error)
        self._made_for, self.largest_bytes = self.device, largest
        if some_unpinned:
            told = [(rank, why) for rank, why in enumerate(control.gather(unpinned)) if why]
            if control.rank == 0:
                log.warning(
                    "host buffers are not pinned on %d of %d ranks: copies from the device take several "
                    "times as long, and training waits for them. Rank %d: %s",
                    *(len(told), control.num_ranks, *told[0]),
                )

    def objects(self, payload: Payload) -> dict[str, Any]:
        """What this rank stores beside tensors: its other leaves, and the paths of all leaves."""
        paths = {} if self._structure is None else {structure.PATHS: self._structure}
        return {**payload.objects, **paths}

    def release(self) -> None:
        """Release the buffers; the next agreement makes new ones."""
        if self.arenas is not None:
            self.arenas.close()
            self.arenas = None


def _no_buffers(error: Exception) -> SaveFailedError:
    return SaveFailedError(f"cannot make its host buffers: {type(error).__name__}: {error}")


def _held(payload: Payload, paths: Structure) -> Held:
    for name in payload.objects:
        check_name(name)
    inside: dict[str, str] = {}
    for name, encoded in payload.objects.items():
        inside |= dict.fromkeys(tensor_names(encoded), name)
    return Held(
        items=held_chunks(payload.tensors),
        objects=tuple(payload.objects),
        inside=inside,
        structure=structure.encode(paths) if paths is not FLAT else None,
        from_lowest_rank=tuple(sorted(payload.from_lowest_rank)),
    )


def _plan_of_all(everything: Sequence[Held]) -> tuple[SavePlan, Union]:
    union = unite(everything)
    return make_plan(union.items), union


def raise_on_all(control: ControlGroup, error: Exception | None) -> None:
    """Raise the error of the lowest rank that has one on every rank, with that rank and the cause.

    Collective: all ranks. TypeError and ValueError keep their type; any other becomes SaveFailedError.
    """
    kind: type[Exception] = SaveFailedError
    if isinstance(error, Exception) and type(error) in (TypeError, ValueError):
        kind = type(error)
    clear = isinstance(error, (KempnerForgeError, kind))
    text = "" if error is None else str(error) if clear and str(error) else f"{type(error).__name__}: {error}"
    told = control.gather((kind, text))
    rank, (kind, text) = next((rank, one) for rank, one in enumerate(told) if one[1])
    raise mark_collective(kind(f"rank {rank}: {text}")) from error


def _difference(by_rank: Sequence[Mapping[str, str]]) -> ValueError | None:
    """Return the error for values that differ between ranks; it names each value and two ranks.

    Of a model ranks may have different parts, and so different entries.
    """
    problems = []
    for name in sorted(set().union(*by_rank)):
        digests = [same.get(name) for same in by_rank]
        other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
        if other is None:
            continue
        if name.startswith("model."):
            known = [(rank, digest) for rank, digest in enumerate(digests) if digest is not None]
            others = [rank for rank, digest in known if digest != known[0][1]]
            if others:
                hint = _HINTS["model."]
                problems.append(f"{name} differs between ranks {known[0][0]} and {others[0]}{hint}")
            continue
        if None in (digests[0], digests[other]):
            there, absent = (other, 0) if digests[0] is None else (0, other)
            problems.append(f"{name} is on rank {there} and not on rank {absent}")
            continue
        hint = next((hint for prefix, hint in _HINTS.items() if name.startswith(prefix)), "")
        problems.append(f"{name} differs between ranks 0 and {other}{hint}")
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return ValueError("; ".join(problems[:_SHOWN]) + more) if problems else None
