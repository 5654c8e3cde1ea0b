"""Plan which rank writes which chunk into which file, and cache the plan and its host buffers.

``make_plan`` does not use DCP's planner, which takes seconds at hundreds of ranks and gathers
pickled metadata at every save. ``SavePlanCache`` plans once. Later saves compare a digest of what
each rank holds, and plan again only if one has changed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch.distributed.tensor import DTensor

from kempnerforge.checkpoint import cuda
from kempnerforge.checkpoint.format import paths, structure
from kempnerforge.checkpoint.format.dtypes import DTYPE_NAMES
from kempnerforge.checkpoint.format.safetensors_file import ShardItem, split_by_name
from kempnerforge.checkpoint.format.structure import FLAT, Structure
from kempnerforge.checkpoint.format.tensor_index import Chunk, TensorEntry, cover_problem
from kempnerforge.checkpoint.results import Payload
from kempnerforge.checkpoint.save import host_memory
from kempnerforge.checkpoint.save.commit import ExpectedFiles, PlannedFile, PlannedItem
from kempnerforge.checkpoint.save.frozen import FrozenFiles
from kempnerforge.checkpoint.save.host_buffers import HostBuffers, needed_bytes
from kempnerforge.checkpoint.save.union import Held, Union, unite
from kempnerforge.checkpoint.state.flatten import TreePayload
from kempnerforge.checkpoint.state.pieces import (
    Boxes,
    check_name,
    check_storable,
    dtype_of,
    global_shape,
    local_pieces,
)
from kempnerforge.checkpoint.state.tensor_leaves import tensor_names
from kempnerforge.distributed.consensus import ControlGroup, mark_collective
from kempnerforge.errors import HostMemoryError, KempnerForgeError, SaveFailedError

log = logging.getLogger("kempnerforge.checkpoint.async_save")
"""The logger of ``AsyncCheckpointer``, the name that users know."""

_DIGEST_BITS = (1 << 62) - 1
_HINTS = {
    "extra.": ": name it in per_rank=",
    "model.": ": keep it equal, or hand it over as extra= and name it in per_rank=",
    "optimizer": ": where a rank has a part of the model, give groups=, the same on all ranks",
}
"""What to do about a value that differs between ranks, by the prefix of its name."""
_SHOWN = 5
"""Names that an error lists at most."""


@dataclass(frozen=True)
class SavePlan:
    """What every rank writes."""

    files: tuple[tuple[PlannedFile, ...], ...]
    """By rank."""

    @property
    def expected(self) -> ExpectedFiles:
        """The files of all ranks, for the check at the commit."""
        return ExpectedFiles(tuple(file for of_rank in self.files for file in of_rank))


def held_chunks(tensors: Mapping[str, torch.Tensor]) -> list[PlannedItem]:
    """Return the chunks of ``tensors`` that this rank holds, sorted by name.

    Leave out chunks without elements, unless the whole tensor has none. Raises TypeError and
    ValueError, naming the tensor, for a kind of tensor, a dtype or a name that a checkpoint cannot
    hold.
    """
    boxes, held = Boxes(), []
    for name, tensor in tensors.items():
        check_name(name)
        check_storable(name, tensor)
        shape, dtype = global_shape(tensor), DTYPE_NAMES[dtype_of(tensor)]
        for piece in local_pieces(name, tensor, boxes):
            chunk = planned_item(name, dtype, piece.offsets, piece.sizes, shape)
            if chunk is not None:
                held.append(chunk)
    return sorted(held, key=lambda chunk: (chunk.item.name, chunk.item.offsets))


def planned_item(
    name: str, dtype: str, offsets: Sequence[int], sizes: Sequence[int], shape: Sequence[int]
) -> PlannedItem | None:
    """Return the chunk to plan; None for an empty chunk of a tensor that has elements."""
    if 0 in sizes and 0 not in shape:
        return None
    return PlannedItem(ShardItem(name, dtype, tuple(offsets), tuple(sizes)), tuple(shape))


Signature = tuple[tuple[Any, ...], ...]
"""All properties that determine the chunks a rank holds. Cheap to make and to compare."""


def signature_of(tensors: Mapping[str, torch.Tensor]) -> Signature | None:
    """Return the signature of ``tensors``; None if one is neither a plain tensor nor a DTensor of one.

    It is also None if a tensor is nested. Equal signatures mean equal ``held_chunks``. Computing
    ``held_chunks`` takes longer than staging a small tensor, which is too long for every save.
    """
    signature: list[tuple[Any, ...]] = []
    for name, tensor in tensors.items():
        if type(tensor) in (torch.Tensor, torch.nn.Parameter):
            if tensor.is_nested:  # it has no shape
                return None
            signature.append((name, tensor.dtype, tensor.shape, tensor.layout, tensor.is_meta))
        elif isinstance(tensor, DTensor) and type(tensor._local_tensor) in (torch.Tensor, torch.nn.Parameter):
            signature.append((name, tensor.dtype, tensor.shape, tensor.placements, tensor.device_mesh))
        else:
            return None
    return tuple(signature)


def digest_of(held: object) -> str:
    """Return a digest of all that a rank holds: names, dtypes, shapes, offsets, other leaves."""
    return xxhash.xxh3_128_hexdigest(repr(held).encode())


def make_plan(
    held_by_rank: Sequence[Sequence[PlannedItem]], frozen: Collection[str] = frozenset()
) -> SavePlan:
    """Assign each chunk to one of the ranks that hold it, so that ranks write about equal numbers of bytes.

    The tensors named in ``frozen`` are in other files than the rest, and divided separately.
    Raises ValueError when the chunks of a tensor do not cover it exactly, or disagree on its shape.
    """
    holders: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    chunks: dict[tuple[str, tuple[int, ...]], PlannedItem] = {}
    for rank, held in enumerate(held_by_rank):
        for chunk in held:
            key = (chunk.item.name, chunk.item.offsets)
            if chunks.setdefault(key, chunk) != chunk:
                other = chunks[key]
                raise ValueError(
                    f"{chunk.item.name} is {_words(other)} on rank {holders[key][0]} and {_words(chunk)} on "
                    f"rank {rank}: it must be the same on all ranks that have it"
                )
            holders.setdefault(key, []).append(rank)
    check_cover(chunks.values())
    mine: list[list[PlannedItem]] = [[] for _ in held_by_rank]
    loads = {is_frozen: [0] * len(held_by_rank) for is_frozen in (False, True)}
    # Assign the chunks with one holder first, then the others, from the largest to the smallest.
    for key in sorted(chunks, key=lambda key: (len(holders[key]) > 1, -chunks[key].item.size_bytes, key)):
        load = loads[key[0] in frozen]
        rank = min(holders[key], key=lambda rank: (load[rank], rank))
        load[rank] += chunks[key].item.size_bytes
        mine[rank].append(chunks[key])
    return name_files(mine, frozen)


def _words(chunk: PlannedItem) -> str:
    return f"{chunk.item.dtype} {chunk.item.sizes} of {chunk.global_shape}"


def check_cover(chunks: Iterable[PlannedItem]) -> None:
    """Raise ValueError, naming the tensor, when chunks do not cover it exactly or disagree on its shape."""
    by_name: dict[str, list[PlannedItem]] = {}
    for chunk in chunks:
        by_name.setdefault(chunk.item.name, []).append(chunk)
    for name, parts in by_name.items():
        shape, dtype = parts[0].global_shape, parts[0].item.dtype
        if any((part.global_shape, part.item.dtype) != (shape, dtype) for part in parts):
            raise ValueError(f"ranks disagree on shape or dtype of {name}")
        boxes = tuple(Chunk("", 0, p.item.size_bytes, p.item.offsets, p.item.sizes) for p in parts)
        if problem := cover_problem(TensorEntry(dtype, shape, boxes)):
            raise ValueError(f"{name}: {problem}")


def name_files(by_rank: Sequence[Sequence[PlannedItem]], frozen: Collection[str] = frozenset()) -> SavePlan:
    """Plan the files of each rank, numbered over all ranks. A name occurs once in a file.

    The files with tensors named in ``frozen`` come after the other files of a rank.
    """
    groups: list[list[tuple[bool, list[PlannedItem]]]] = []
    for chunks in by_rank:
        of_rank = []
        for is_frozen in (False, True):
            members = [chunk for chunk in chunks if (chunk.item.name in frozen) == is_frozen]
            for positions in split_by_name([chunk.item.name for chunk in members]):
                of_rank.append((is_frozen, [members[position] for position in positions]))
        groups.append(of_rank)
    count, number = sum(map(len, groups)), 0
    files: list[tuple[PlannedFile, ...]] = []
    for of_rank in groups:
        numbers = range(number, number := number + len(of_rank))
        files.append(
            tuple(
                PlannedFile(paths.shard_name(at, count), tuple(items), frozen=is_frozen)
                for at, (is_frozen, items) in zip(numbers, of_rank, strict=True)
            )
        )
    return SavePlan(tuple(files))


class SavePlanCache:
    """The plan of one state dict and its host buffers, agreed on by all ranks.

    A repeated save compares signatures and takes one small reduction. ``max_host_memory_gb``: the
    most memory that the buffers may take on one machine. None: as much as is free there.
    ``on_release`` is called when buffers are released, so that no other process keeps their memory.
    """

    def __init__(
        self, max_host_memory_gb: float | None = None, on_release: Callable[[], None] = lambda: None
    ) -> None:
        self._max_host_memory_gb = max_host_memory_gb
        self._on_release = on_release
        self.device: torch.device | None = None
        """The CUDA device that this rank's tensors are on; None if they are in host memory."""
        self._made_for: torch.device | None = None
        self.buffers: HostBuffers | None = None
        self.files: tuple[PlannedFile, ...] = ()
        """The files that this rank writes."""
        self.frozen = FrozenFiles()
        self.expected: ExpectedFiles | None = None
        """The files that all ranks write. Set only on the first rank, which commits."""
        self.largest_bytes = 0
        """Size of all files of the rank that has most. The time-out of all ranks depends on it."""
        self.contributed: frozenset[str] = frozenset()
        """Non-tensor leaves whose values this rank sends to the first rank: no lower rank has them."""
        self._structure: dict[str, Any] | None = None
        """The paths of the leaves of all ranks in a nested state dict, as JSON."""
        self._last_update: tuple[Signature | None, tuple[str, ...], Structure, frozenset[str]] | None = None
        self._held = Held([])
        self._held_digest = ""
        self._agreed_digest = ""

    def update(self, payload: Payload) -> None:
        """Determine which chunks and leaves of ``payload`` this rank holds.

        Raises TypeError and ValueError for what cannot be stored.
        """
        self.device = cuda.device_of(payload.tensors)
        leaf_paths = payload.structure if isinstance(payload, TreePayload) else FLAT
        frozen = self.frozen.update(payload)
        names = (*payload.objects, *payload.from_lowest_rank)
        update = (signature_of(payload.tensors), names, leaf_paths, frozen)
        if update[0] is not None and update == self._last_update:
            return
        self._last_update = None
        self._held = _held(payload, leaf_paths, frozen)
        self._held_digest = digest_of(self._held)
        self._last_update = update

    def agree(
        self,
        control: ControlGroup,
        error: Exception | None,
        *,
        same: Mapping[str, str] | None = None,
    ) -> None:
        """Keep the plan, or make a new one and new buffers if any rank needs it.

        Collective: all ranks. ``error``: why this rank could not prepare its part. It is raised on
        all ranks as TypeError, ValueError or SaveFailedError, with rank and cause. ``same``:
        digests, by name, of values that must be equal on all ranks. A difference raises ValueError
        on all ranks, naming the value.
        """
        number = xxhash.xxh3_64_intdigest(repr(sorted((same or {}).items())).encode()) & _DIGEST_BITS
        changed = self._held_digest != self._agreed_digest or self.device != self._made_for
        changed = changed or self._lacks_buffers()
        failed, changed, highest, lowest = control.agree([error is not None, changed, number, -number])
        if failed:
            raise_on_all(control, error)
        if highest != -lowest:
            problem = _difference(control.gather(dict(same or {})))
            if problem is not None:
                raise mark_collective(problem)
        if changed:
            self._make(control)

    def _lacks_buffers(self) -> bool:
        """Return whether a file has neither a buffer nor, in the last committed step, a file to link."""
        if self.buffers is None:
            return True
        staged = {buffer.file.name for buffer in self.buffers.buffers}
        return any(file.name not in staged and self.frozen.source_of(file) is None for file in self.files)

    def _make(self, control: ControlGroup) -> None:
        everything = control.gather(self._held)
        plan, union = control.run_on_rank0(lambda: _plan_of_all(everything))
        self.release()
        files = plan.files[control.rank]
        if files != self.files:
            self.files = files
        self._make_buffers(control)
        self.expected = plan.expected if control.rank == 0 else None
        self.contributed = union.contributed[control.rank]
        self._structure = union.structure
        self._agreed_digest = self._held_digest

    def _make_buffers(self, control: ControlGroup) -> None:
        """Make buffers of the files that are not linked, if all ranks' fit. Collective: raises on all."""
        files = [file for file in self.files if self.frozen.source_of(file) is None]
        error: Exception | None = None
        claim = None
        try:
            claim = host_memory.claim(needed_bytes(files))
        except Exception as cause:  # noqa: BLE001 - raised on all ranks below
            error = _no_buffers(cause)
        # All ranks measure the free memory before any rank allocates, so no buffer is counted as used.
        claims = control.gather(claim)
        if None in claims:
            raise_on_all(control, error)
        fault = host_memory.fault([each for each in claims if each is not None], self._max_host_memory_gb)
        if fault is not None:
            raise HostMemoryError(fault)
        try:
            self.buffers = HostBuffers(files, self.device)
        except Exception as cause:  # noqa: BLE001 - raised on all ranks below
            error = _no_buffers(cause)
        unpinned = self.buffers.pin_error if self.buffers is not None else ""
        size_bytes = needed_bytes(self.files)
        failed, some_unpinned, largest = control.agree([error is not None, bool(unpinned), size_bytes])
        if failed:
            self.release()
            raise_on_all(control, error)
        self._made_for, self.largest_bytes = self.device, largest
        if some_unpinned:
            failures = [(rank, why) for rank, why in enumerate(control.gather(unpinned)) if why]
            if control.rank == 0:
                log.warning(
                    "host buffers are not pinned on %d of %d ranks: copies from the device take several "
                    "times as long, and training waits for them. Rank %d: %s",
                    *(len(failures), control.num_ranks, *failures[0]),
                )

    def objects(self, payload: Payload) -> dict[str, Any]:
        """Return what this rank stores besides tensors: its other leaves, and the paths of all leaves."""
        leaf_paths = {} if self._structure is None else {structure.PATHS: self._structure}
        return {**payload.objects, **leaf_paths}

    def release(self) -> None:
        """Release the buffers. The next agreement makes new ones."""
        if self.buffers is not None:
            self.buffers.close()
            self.buffers = None
            self._on_release()


def _no_buffers(error: Exception) -> SaveFailedError:
    return SaveFailedError(f"cannot make its host buffers: {type(error).__name__}: {error}")


def _held(payload: Payload, leaf_paths: Structure, frozen: frozenset[str]) -> Held:
    for name in payload.objects:
        check_name(name)
    inside: dict[str, str] = {}
    for name, encoded in payload.objects.items():
        inside |= dict.fromkeys(tensor_names(encoded), name)
    return Held(
        items=held_chunks(payload.tensors),
        objects=tuple(payload.objects),
        inside=inside,
        structure=structure.encode(leaf_paths) if leaf_paths is not FLAT else None,
        from_lowest_rank=tuple(sorted(payload.from_lowest_rank)),
        frozen=tuple(sorted(frozen)),
    )


def _plan_of_all(everything: Sequence[Held]) -> tuple[SavePlan, Union]:
    union = unite(everything)
    return make_plan(union.items, union.frozen), union


def raise_on_all(control: ControlGroup, error: Exception | None) -> None:
    """Raise, on every rank, the error of the lowest rank that has one, with that rank and the cause.

    Collective: all ranks. TypeError and ValueError keep their type. Others become SaveFailedError.
    """
    kind: type[Exception] = SaveFailedError
    if isinstance(error, Exception) and type(error) in (TypeError, ValueError):
        kind = type(error)
    text = ""
    if error is not None:
        is_clear = isinstance(error, (KempnerForgeError, kind)) and str(error)
        text = str(error) if is_clear else f"{type(error).__name__}: {error}"
    failures = control.gather((kind, text))
    rank, (kind, text) = next((rank, failure) for rank, failure in enumerate(failures) if failure[1])
    raise mark_collective(kind(f"rank {rank}: {text}")) from error


def _difference(by_rank: Sequence[Mapping[str, str]]) -> ValueError | None:
    """Return the error for values that differ between ranks. It names each value and two ranks.

    Ranks may have different parts of a model, and so different names.
    """
    problems = []
    for name in sorted(set().union(*by_rank)):
        digests = [same.get(name) for same in by_rank]
        other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
        if other is None:
            continue
        if name.startswith("model."):
            present = [(rank, digest) for rank, digest in enumerate(digests) if digest is not None]
            others = [rank for rank, digest in present if digest != present[0][1]]
            if others:
                hint = _HINTS["model."]
                problems.append(f"{name} differs between ranks {present[0][0]} and {others[0]}{hint}")
            continue
        if None in (digests[0], digests[other]):
            there, absent = (other, 0) if digests[0] is None else (0, other)
            problems.append(f"{name} is on rank {there} and not on rank {absent}")
            continue
        hint = next((hint for prefix, hint in _HINTS.items() if name.startswith(prefix)), "")
        problems.append(f"{name} differs between ranks 0 and {other}{hint}")
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return ValueError("; ".join(problems[:_SHOWN]) + more) if problems else None
