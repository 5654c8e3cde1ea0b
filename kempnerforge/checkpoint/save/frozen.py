"""Link files of frozen tensors into the next step instead of writing them again.

A tensor is frozen if it is a parameter that requires no gradient. Frozen tensors have files of
their own. Before such a file is linked, one of two proofs shows that it has the bytes of memory:

- a fingerprint of every frozen tensor has not changed since this process wrote or linked the file.
  Fingerprints also notice writes through ``.data``, which leave no other trace.
- the digests of the file, computed from memory again, equal those in the manifest of the step. The
  first save after a resume uses this proof.

A tensor that changes nevertheless is not frozen: from then on it is written by every save.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import xxhash

from kempnerforge.checkpoint.format import manifest
from kempnerforge.checkpoint.format.checksums import FileRecord
from kempnerforge.checkpoint.results import Payload
from kempnerforge.checkpoint.save.commit import PlannedFile
from kempnerforge.checkpoint.save.writer_process import FileIdentity
from kempnerforge.checkpoint.state.pieces import Sizes, piece_at
from kempnerforge.errors import CheckpointError

NEVER = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of ``link`` after which a rank does not try again. Others, such as too many links, may pass."""
OF_OTHERS = (errno.EPERM, errno.EACCES)
"""Of these, errors that may be due to the owner of the file. Linux does not link files of another user
(fs.protected_hardlinks), which is who started an earlier attempt."""
_CHUNK = 1 << 20
"""Words of which a fingerprint on a device is computed at once."""
_FACTOR = 0x27D4EB2F165667C5
_LOW = 0xFFFFFFFF


@dataclass(frozen=True)
class FileSource:
    """A file of a committed step that has the bytes of this rank's frozen tensors."""

    path: Path
    record: FileRecord
    header_digest: str
    identity: FileIdentity


@dataclass
class FrozenSave:
    """The files of frozen tensors in one save of one rank. Its thread fills it."""

    links: Sequence[tuple[PlannedFile, FileSource]] = ()
    """Files to link. All others are in the host buffers."""
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    """What to write if a link fails."""
    step_folder: Path | None = None
    """A committed step that may have files with the same digests."""
    may_link: bool = False
    done: dict[str, FileSource] = field(default_factory=dict[str, FileSource])
    """What this save has under each name."""
    linked_bytes: int = 0
    refused: str = ""
    """Why the file system cannot link; empty if it can."""
    warnings: list[str] = field(default_factory=list[str])

    def same_size(self, size_bytes: int) -> dict[Path, FileRecord]:
        """Return the files of ``step_folder`` that have this size, with their digests."""
        if self.step_folder is None or not self.may_link:
            return {}
        try:
            files = manifest.read(self.step_folder).files
        except (CheckpointError, OSError):  # the step is gone: write the file
            return {}
        folder = self.step_folder
        return {folder / name: rec for name, rec in files.items() if rec.size_bytes == size_bytes}

    def link_failed(self, name: str, number: int | None, why: str, *, is_own: bool) -> None:
        """Note why ``name`` is written although its tensors have not changed.

        ``number``: the errno. ``is_own``: whether this attempt has written or linked the file before.
        """
        if number in NEVER and (is_own or number not in OF_OTHERS):
            self.refused, self.may_link = why, False
            why += "; this attempt does not try again"
        self.warnings.append(f"{name} has only frozen tensors and was written again: {why}")


class FrozenFiles:
    """Knows which tensors of this rank are frozen, and which files of the last committed step have them."""

    def __init__(self) -> None:
        self.step_folder: Path | None = None
        """The last committed step whose files may be linked."""
        self.refused = ""
        """Why nothing is linked on this rank; empty if it is."""
        self._names: frozenset[str] | None = None
        self._files: Sequence[PlannedFile] = ()
        self._prints: dict[tuple[str, Sizes], str] = {}
        self._sources: dict[str, FileSource] = {}
        self._warnings: list[str] = []

    def update(self, payload: Payload) -> frozenset[str]:
        """Return the names of the tensors of ``payload`` that are frozen and have not changed."""
        names = payload.frozen if self._names is None else self._names & payload.frozen
        changed: list[str] = []
        if not self.refused:
            try:
                changed = self._changed(names, payload.tensors)
            except Exception as error:  # noqa: BLE001 - such as a full device; the save can write
                self._refuse(error)
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            self._warnings.append(
                f"{changed[0]}{more} requires no gradient and has changed since the save before: this and "
                "every later save of the attempt writes it"
            )
        self._names = names.difference(changed)
        return self._names

    def _changed(self, names: frozenset[str], tensors: Mapping[str, torch.Tensor]) -> list[str]:
        """Return which of ``names`` have other bytes than at the last ``begin``, sorted."""
        keys = [key for key in self._prints if key[0] in names]
        now = fingerprints(piece_at(name, tensors[name], offsets) for name, offsets in keys)
        return sorted({key[0] for key, found in zip(keys, now, strict=True) if found != self._prints[key]})

    def source_of(self, file: PlannedFile) -> FileSource | None:
        """Return the file of the last committed step to link as ``file``; None if it has to be staged."""
        known = file.frozen and not self.refused and any(file is planned for planned in self._files)
        return self._sources.get(file.name) if known else None

    def begin(self, files: Sequence[PlannedFile], tensors: Mapping[str, torch.Tensor]) -> FrozenSave:
        """Return the frozen part of a save of ``files``, those of this rank. Raises nothing."""
        frozen = [file for file in files if file.frozen]
        if files is not self._files:
            self._sources, self._files = {}, files
        if not self.refused:
            try:
                self._remember(frozen, tensors)
            except Exception as error:  # noqa: BLE001 - other ranks go on with the save, and this one can write
                self._refuse(error)
        warnings, self._warnings = self._warnings, []
        found = [(file, self.source_of(file)) for file in frozen]
        return FrozenSave(
            links=[(file, source) for file, source in found if source is not None],
            tensors={planned.item.name: tensors[planned.item.name] for f in frozen for planned in f.items},
            step_folder=self.step_folder,
            may_link=not self.refused,
            warnings=warnings,
        )

    def _refuse(self, error: Exception) -> None:
        """Link nothing for the rest of the attempt, because fingerprints cannot be computed."""
        self.refused = f"{type(error).__name__}: {error}"
        self._warnings.append(f"frozen tensors are written by every save: {self.refused}")

    def _remember(self, files: Iterable[PlannedFile], tensors: Mapping[str, torch.Tensor]) -> None:
        keys = [(planned.item.name, planned.item.offsets) for file in files for planned in file.items]
        new = [key for key in keys if key not in self._prints]
        prints = fingerprints(piece_at(name, tensors[name], offsets) for name, offsets in new)
        self._prints = {**self._prints, **dict(zip(new, prints, strict=True))}
        self._prints = {key: self._prints[key] for key in keys}

    def is_unchanged(self, file: PlannedFile, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Return whether the tensors of ``file`` are those of the last ``begin``. Any thread."""
        keys = [(planned.item.name, planned.item.offsets) for planned in file.items]
        now = fingerprints(piece_at(name, tensors[name], offsets) for name, offsets in keys)
        return now == [self._prints.get(key) for key in keys]

    def ended(self, save: FrozenSave, final: Path, *, committed: bool) -> None:
        """Remember the outcome of a save."""
        self.refused = self.refused or save.refused
        if committed:
            self.step_folder = final
            self._sources = dict(save.done)


def fingerprints(tensors: Iterable[torch.Tensor]) -> list[str]:
    """Return a fingerprint of the bytes of each tensor.

    In host memory it is xxh3-128. On a device it is a sum of mixed 64-bit words with odd factors: any
    change of one word changes it, others do with a probability of about 1 - 2^-63. Computing it reads
    the tensors once and waits for the device once.
    """
    found: list[str] = []
    on_device: list[tuple[int, torch.Tensor]] = []
    with torch.no_grad():
        for tensor in tensors:
            flat = tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1)
            if flat.device.type == "cpu":
                found.append(xxhash.xxh3_128_hexdigest(flat.view(torch.uint8).numpy().data))
            else:
                on_device.append((len(found), _word_sum(flat)))
                found.append("")
        if on_device:
            sums: list[int] = torch.stack([total for _, total in on_device]).tolist()
            for (position, _), total in zip(on_device, sums, strict=True):
                found[position] = f"{total & 0xFFFFFFFFFFFFFFFF:016x}"
    return found


def _word_sum(flat: torch.Tensor) -> torch.Tensor:
    """Return the sum, int64 [], of the words of ``flat``, each times an odd factor of its position."""
    raw = flat.view(torch.uint8)
    size = math.gcd(8, raw.numel(), raw.storage_offset())
    words = raw.view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[size])
    factors = torch.arange(min(_CHUNK, words.numel()), device=flat.device) * _FACTOR
    factors ^= factors >> 29
    factors |= 1
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for chunk in words.split(_CHUNK):
        mixed = _folded(_folded(chunk.to(torch.int64)) * _FACTOR)
        total = total * _FACTOR + (mixed * factors[: chunk.numel()]).sum()
    return total


def _folded(words: torch.Tensor) -> torch.Tensor:
    """Return the words with their high bits in the low ones too. Different words stay different.

    A product has no trace of high bits in its low ones: without this, the changes of two signs, which
    are the highest bits of words, cancel each other in a sum.
    """
    return words ^ ((words >> 32) & _LOW)
