"""Turn shard files in a hidden folder into a committed checkpoint."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from kempnerforge import fsio
from kempnerforge.checkpoint.format import manifest, paths, tensor_index
from kempnerforge.checkpoint.format.checksums import FileRecord, record_of
from kempnerforge.checkpoint.format.safetensors_file import ShardItem, plan_image
from kempnerforge.checkpoint.format.tensor_index import Chunk, TensorEntry
from kempnerforge.errors import CheckpointError, SaveFailedError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedItem:
    """A chunk that a rank writes, with the shape of its whole tensor."""

    item: ShardItem
    global_shape: tuple[int, ...]


@dataclass(frozen=True)
class PlannedFile:
    """A shard file that a rank writes."""

    name: str
    items: tuple[PlannedItem, ...]
    frozen: bool = False
    """Whether it has only frozen tensors, so that a later step may link to it."""

    @property
    def shard_items(self) -> list[ShardItem]:
        """The chunks of the file."""
        return [planned.item for planned in self.items]


@dataclass(frozen=True)
class FileReport:
    """A rank's report of a file that it has written and synced."""

    record: FileRecord
    header_digest: str
    """xxh3-128 of the header that the rank wrote, which lists every chunk and its offset."""


@dataclass(frozen=True)
class CheckpointPayload:
    """What a checkpoint contains besides its tensors."""

    provenance: manifest.Provenance = field(default_factory=manifest.Provenance)
    objects: Mapping[str, Any] = field(default_factory=dict)
    """Non-tensor leaves by name, as JSON."""
    config_toml: str = ""


class ExpectedFiles:
    """The files that all ranks together must write. Made once per plan, used at every commit."""

    def __init__(self, files: tuple[PlannedFile, ...]) -> None:
        self.files = files
        self._sizes: dict[str, tuple[int, str]] = {}
        chunks: dict[str, list[Chunk]] = {}
        heads: dict[str, tuple[str, tuple[int, ...]]] = {}
        for file in files:
            image = plan_image(file.shard_items)
            self._sizes[file.name] = (image.size_bytes, xxhash.xxh3_128_hexdigest(image.header))
            for planned, begin in zip(file.items, image.begins, strict=True):
                item = planned.item
                chunk = Chunk(file.name, begin, begin + item.size_bytes, item.offsets, item.sizes)
                chunks.setdefault(item.name, []).append(chunk)
                heads[item.name] = (item.dtype, planned.global_shape)
        entries = {name: TensorEntry(*head, tuple(chunks[name])) for name, head in heads.items()}
        self.index = tensor_index.encode(entries)
        self.has_new_dtypes = any(dtype in tensor_index.SHORT_NAMES for dtype, _ in heads.values())
        """Whether the index has dtypes that the first version of format 1 cannot read."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all shards and the index, which is nearly all that a save writes."""
        return len(self.index) + sum(size for size, _ in self._sizes.values())

    def linkable_bytes(self, step_folder: Path) -> int:
        """Return the bytes of files of frozen tensors that ``step_folder`` has with the same names and sizes.

        Raises CheckpointError and OSError if it cannot be read.
        """
        sizes = [(file.name, self._sizes[file.name][0]) for file in self.files if file.frozen]
        stored = manifest.read(step_folder).files if sizes else {}
        return sum(size for name, size in sizes if name in stored and stored[name].size_bytes == size)

    def check(self, reports: Mapping[str, FileReport]) -> None:
        """Raise SaveFailedError unless every planned file was reported in full, with every chunk.

        DCP itself can report success for a write that failed (pytorch issue 191391).
        """
        for name, (size_bytes, header_digest) in self._sizes.items():
            report = reports.get(name)
            if report is None:
                raise SaveFailedError(f"{name} was not written")
            if report.record.size_bytes != size_bytes:
                raise SaveFailedError(f"{name} has {report.record.size_bytes} of {size_bytes} bytes")
            if report.header_digest != header_digest:
                raise SaveFailedError(f"{name} was written to another plan")
        if extra := reports.keys() - self._sizes.keys():
            raise SaveFailedError(f"{sorted(extra)[0]} was written and not planned")


def make_temporary(final: Path, temporary: Path) -> None:
    """Make the hidden folder that becomes ``final``. Delete what a failed or killed save left there.

    Raises SaveFailedError if ``final`` exists, and OSError.
    """
    if final.exists():
        raise SaveFailedError(f"{final} exists; a committed checkpoint is never replaced{_whose(final)}")
    fsio.make_folder(final.parent)
    shutil.rmtree(temporary, ignore_errors=True)
    fsio.new_folder(temporary)


def _whose(final: Path) -> str:
    """Return a note on which run the step belongs to; empty if its manifest does not say."""
    try:
        run_id = manifest.read(final).provenance.run_id
    except (CheckpointError, OSError):
        return ""
    return f" (it is a step of run {run_id})" if run_id else ""


def commit(
    temporary: Path,
    final: Path,
    *,
    expected: ExpectedFiles,
    reports: Mapping[str, FileReport],
    contents: CheckpointPayload,
    before_publish: Callable[[], None] = lambda: None,
) -> int:
    """Check the shards, write the other files, with the manifest last, and rename the folder.

    ``before_publish`` may raise to forbid the rename, which cannot be undone. Durable on return.
    Returns the bytes of the whole checkpoint. Raises SaveFailedError and OSError.
    """
    expected.check(reports)
    for name, report in reports.items():
        size_bytes = (temporary / name).stat().st_size
        if size_bytes != report.record.size_bytes:
            raise SaveFailedError(f"{name} has {size_bytes} of {report.record.size_bytes} bytes")
    small = {
        paths.INDEX: expected.index,
        paths.TRAIN_STATE: (json.dumps(dict(contents.objects), indent=1) + "\n").encode(),
    }
    if contents.config_toml:
        small[paths.CONFIG] = contents.config_toml.encode()
    for name, data in small.items():
        fsio.write_new_file(temporary / name, data)
    shards = {name: report.record for name, report in reports.items()}
    files = {**shards, **{name: record_of(data) for name, data in small.items()}}
    minor = int(expected.has_new_dtypes or manifest.needs_minor(small[paths.TRAIN_STATE]))
    body = manifest.encode(contents.provenance, files, minor=minor)
    fsio.write_new_file(temporary / paths.MANIFEST, body)
    fsio.fsync_folder(temporary)
    before_publish()
    fsio.publish(temporary, final)
    log.debug("committed %s: %d files", final, len(files) + 1)
    return sum(record.size_bytes for record in files.values()) + len(body)
