"""Tokenize text into a prepared folder, which is written under a temporary name and then renamed.

See :mod:`kempnerforge.data.index` for its content. Beside it, while it is being written::

    .NAME.KEY.parts/          the parts that are finished; the same command goes on with them
    .NAME.PID.RANDOM.tmp/     the shards of one process, until they are renamed to NAME

KEY is a digest of the text and of everything on which the tokens depend. So a process that prepares
the same at the same time only saves work, and other text never meets parts that are not its own.
This module does not import torch.
"""

from __future__ import annotations

import errno
import functools
import glob
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kempnerforge.data.assembly import Assembly
from kempnerforge.data.encoding import KNOWN_SEPARATORS, Encoder, TextEncoder
from kempnerforge.data.index import (
    FORMAT,
    INDEX_NAME,
    NAMED_LEFT_OUT,
    Index,
    LeftOut,
    TextSettings,
    json_digest,
    read_index,
)
from kempnerforge.data.prepare_progress import Meter, OnProgress, Reporter
from kempnerforge.data.prepare_workers import write_parts
from kempnerforge.data.reading.files import FoundFiles, digest_file, find_files
from kempnerforge.data.reading.locations import Location, location_texts
from kempnerforge.data.reading.options import ReadOptions
from kempnerforge.data.reading.streams import StorageError
from kempnerforge.data.reading.units import UNIT_BYTES, units_of
from kempnerforge.data.token_parts import PART_FORMAT, Part, Task, make_tasks
from kempnerforge.data.tokenizer import BY_OPTION, HfTokenizer, Tokenizer, token_dtype
from kempnerforge.errors import DataError
from kempnerforge.fsio import fsync_folder, make_folder, new_folder, publish, write_new_file

log = logging.getLogger(__name__)

SHARD_TOKENS = 128 << 20
"""Tokens per shard."""

TASK_BYTES = 4 << 20
"""Bytes of files that one process tokenizes before it takes the next. What is not finished is repeated
after a kill."""

TASK_UNITS = 4096
"""Files, or parts of files, of a task at most: thousands of small files are less than ``TASK_BYTES``."""

ABANDONED_AFTER_S = 7 * 24 * 3600.0
"""A temporary folder without a write for this long was left by a killed process."""

TURN_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>")
"""Tokens that instruct models write after a turn, not after a document."""

MakeEncoder = Callable[[Tokenizer, ReadOptions], Encoder]


def prepare(
    text: str | Sequence[str],
    folder: Path,
    tokenizer: Tokenizer,
    *,
    options: ReadOptions | None = None,
    make_encoder: MakeEncoder = TextEncoder,
    val_fraction: float = 0.01,
    shard_tokens: int = SHARD_TOKENS,
    workers: int | None = None,
    progress: OnProgress | None = None,
) -> Index:
    """Tokenize ``text``, as :func:`~kempnerforge.data.reading.files.find_files` takes it, into a new folder.

    The folder appears complete or not at all. After a kill, the same call goes on with the parts
    that were finished. Its bytes do not depend on that, nor on ``workers``, the number of processes
    (None: one for each processor).

    Raises :class:`DataError` if the text cannot be read, ``folder`` exists and is not empty, or it
    cannot be written.
    """
    if folder.name in ("", ".."):
        raise DataError(f"{folder} is no name of a folder to create; name it, such as {folder / 'tokens'}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} exists and is not an empty folder; name another, or delete it first")
    encoder = make_encoder(tokenizer, options or ReadOptions())
    source = _Source.find(text, encoder, progress)
    job = _Preparation(source, encoder, val_fraction, shard_tokens, workers, progress)
    index = job.write_to(folder)
    if index is None:
        raise DataError(f"{folder} was created by another process in the meantime; name another folder")
    return index


def prepare_cached(
    text: str | Sequence[str],
    tokenizer: Tokenizer,
    cache_dir: Path,
    *,
    options: ReadOptions | None = None,
    make_encoder: MakeEncoder = TextEncoder,
    val_fraction: float = 0.01,
    progress: OnProgress | None = None,
    label: str = "data",
) -> Path:
    """Return the prepared folder of ``text`` below ``cache_dir``; create it if it does not exist.

    Its name is a digest of every file's content, the tokenizer, the options, ``val_fraction`` and
    the format, so changed text or another tokenizer gives another folder. Several processes may
    call this at once: all get the folder that was published first. What was left out is logged, in
    lines that begin with ``label``.

    Raises :class:`DataError` if the text cannot be read or the folder cannot be written.
    """
    encoder = make_encoder(tokenizer, options or ReadOptions())
    source = _Source.find(text, encoder, progress)
    job = _Preparation(source, encoder, val_fraction, SHARD_TOKENS, None, progress)
    folder = cache_dir / f"tokens-{job.key}"
    if not (folder / INDEX_NAME).is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise DataError(f"{folder} is damaged: it has no {INDEX_NAME}. Delete it and start again")
        job.write_to(folder)
    log_notes(read_index(folder), passed_over=source.passed_over, label=label)
    return folder


def log_notes(index: Index, *, passed_over: LeftOut | None = None, label: str = "data") -> None:
    """Log how the tokens of ``index`` were made, what was left out, and the warnings.

    ``passed_over`` are the files that are not read today. None: those when the text was prepared.
    """
    for line in index.text.notes:
        log.info(f"{label}: {line}")
    passed_over = index.passed_over if passed_over is None else passed_over
    for line in (*passed_over.lines(), *index.unreadable.lines(), *index.text.warnings):
        log.warning(f"{label}: {line}")


@dataclass(frozen=True)
class _Source:
    """The files of a text setting, with a digest of the content of each. There may be very many."""

    found: FoundFiles
    digests: tuple[bytes, ...]
    tasks: tuple[Task, ...]

    @classmethod
    def find(cls, text: str | Sequence[str], encoder: Encoder, progress: OnProgress | None) -> _Source:
        found = find_files(text, Meter("found", 0, progress).add)
        found.require_text()
        units = (unit for file in found.files for unit in units_of(file, encoder.options))
        tasks = tuple(make_tasks(units, TASK_BYTES, TASK_UNITS))
        meter = Meter("read", found.size_bytes, progress)
        return cls(found, tuple(digest_file(file.path, meter.add) for file in found.files), tasks)

    @property
    def passed_over(self) -> LeftOut:
        return LeftOut.of((file.name, file.reason) for file in self.found.passed_over)


@dataclass(frozen=True)
class _Preparation:
    source: _Source
    encoder: Encoder
    val_fraction: float
    shard_tokens: int
    workers: int | None
    progress: OnProgress | None

    @functools.cached_property
    def key(self) -> str:
        """Digest of the text and of everything on which the tokens and the splits depend."""
        files = zip(self.source.found.files, self.source.digests, strict=True)
        return json_digest(
            {"format": FORMAT, "encoder": self.encoder.key(), "val_fraction": self.val_fraction},
            files=([digest.hex(), file.format, file.compression] for file, digest in files),
        )

    def write_to(self, folder: Path) -> Index | None:
        """Write the parts, then a temporary folder, and publish it.

        Return None if another process published first.
        """
        # Parts of a version that divides files differently are others.
        parts_key = json_digest([self.key, PART_FORMAT, TASK_BYTES, TASK_UNITS, UNIT_BYTES])
        parts = folder.with_name(f".{folder.name}.{parts_key}.parts")
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
        try:
            make_folder(folder.parent)
            _remove_abandoned(folder, but=parts)
            make_folder(parts)
            self._write_parts(parts)
            new_folder(temporary)
            index = self._assemble(parts, temporary)
            published = _publish_first(temporary, folder)
        except OSError as error:
            if (folder / INDEX_NAME).is_file():  # another process has published, and removed the parts
                return None
            kept = f"; finished parts are kept in {parts}" if parts.is_dir() else ""
            raise DataError(
                f"cannot write prepared tokens to {folder}: {error.strerror or error}{kept}. "
                "Free space and run the same command to go on, or set --out or data.cache_dir to a "
                "writable folder with enough free space"
            ) from error
        except StorageError as error:  # which may answer again
            kept = f"; finished parts are kept in {parts}. Run the same command to go on"
            raise StorageError(f"{error}{kept if parts.is_dir() else ''}") from error
        except DataError:
            shutil.rmtree(parts, ignore_errors=True)
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(parts, ignore_errors=True)
        return index if published else None

    def _write_parts(self, parts: Path) -> None:
        reporter = Reporter(self.source.found.size_bytes, self.progress)
        write_parts(
            self.source.tasks,
            self.encoder,
            parts,
            workers=self.workers,
            report=reporter.add,
            finished=reporter.finish,
        )

    def _assemble(self, parts: Path, folder: Path) -> Index:
        unreadable, warnings = self._notes(Part.read(parts / task.name) for task in self.source.tasks)
        assembly = Assembly(self.source.tasks, parts, self.encoder, self.val_fraction)
        _require_documents(assembly.num_documents, unreadable)
        tokenizer, options = self.encoder.tokenizer, self.encoder.options
        special = tokenizer.special
        index = Index(
            dtype=token_dtype(tokenizer.vocab_size).name,
            vocab_size=tokenizer.vocab_size,
            separator_id=tokenizer.separator_id,
            tokenizer=tokenizer.name,
            tokenizer_digest=tokenizer.digest,
            val_fraction=self.val_fraction,
            splits=assembly.write(folder, self.shard_tokens, self.progress),
            passed_over=self.source.passed_over,
            unreadable=unreadable,
            text=TextSettings(
                eos_token=special.eos,
                eos_source=special.eos_source,
                bos_token=special.bos,
                bos_id=special.bos_id,
                unwritten_bos=special.unwritten_bos,
                format=self.encoder.format,
                notes=self.encoder.notes,
                text_field=options.text_field,
                document_separator=options.document_separator,
                skip_unreadable=options.skip_unreadable,
                warnings=tuple(warnings),
            ),
        )
        for name, data in self.encoder.files().items():
            write_new_file(folder / name, data)
        write_new_file(folder / INDEX_NAME, index.to_json())
        fsync_folder(folder)
        return index

    def _notes(self, parts: Iterable[Part]) -> tuple[LeftOut, list[str]]:
        """Return what could not be read, and the warnings."""
        counts: dict[str, int] = {}
        first: list[tuple[Location, str]] = []
        separators: dict[str, str] = {}
        notices: dict[str, tuple[Location, str]] = {}
        for part in parts:
            for reason, count in part.unreadable.items():
                counts[reason] = counts.get(reason, 0) + count
            first += part.first_unreadable[: NAMED_LEFT_OUT - len(first)]
            for separator, path in part.separators.items():
                separators.setdefault(separator, path)
            notices = part.notices | notices
        where = location_texts(location for location, _ in (*first, *notices.values()))
        notes = [f"{file.name}: {file.note}" for file in self.source.found.files if file.note]
        warnings = [*self.source.found.notes[:NAMED_LEFT_OUT], *notes[:NAMED_LEFT_OUT]]
        warnings += [
            f"{path} contains the text {separator}: if it separates documents, set "
            f"data.document_separator (--document-separator)"
            for separator, path in separators.items()
        ]
        warnings += [f"{where[location]} {text}" for location, text in notices.values()]
        if self.encoder.format != "chat":  # where the template writes the ends
            warnings += turn_end_warnings(self.encoder.tokenizer)
        return LeftOut(counts, tuple((where[location], reason) for location, reason in first)), warnings


def turn_end_warnings(tokenizer: Tokenizer) -> list[str]:
    """Return a warning if documents end with a token that instruct models write after a turn."""
    special = tokenizer.special
    if (
        not isinstance(tokenizer, HfTokenizer)
        or special.eos not in TURN_ENDS
        or special.eos_source == BY_OPTION
    ):
        return []
    others = [token for token in KNOWN_SEPARATORS if tokenizer.has_token(token)]
    return [
        f"documents end with {special.eos}, which {special.eos_source} names and instruct models write after "
        f"a turn. The vocabulary also has {token}: to end documents with it, set data.eos_token (--eos-token)"
        for token in others[:1]
    ]


def _require_documents(num_documents: int, unreadable: LeftOut) -> None:
    if num_documents > unreadable.total:
        return
    if not unreadable.total:
        raise DataError("the text has no documents: all files are empty or have only white space")
    lines = "\n".join(unreadable.lines())
    raise DataError(
        f"most of the text cannot be read: {num_documents:,} documents were read, and {unreadable.total:,} "
        f"were not\n{lines}"
    )


def _publish_first(temporary: Path, folder: Path) -> bool:
    """Publish and return True, or return False if another process has. Replaces an empty folder."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    try:
        publish(temporary, folder)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY) and (folder / INDEX_NAME).is_file():
            return False
        raise
    return True


def _remove_abandoned(folder: Path, *, but: Path) -> None:
    """Remove the temporary folders for ``folder`` whose writers were killed long ago, all ``but`` one."""
    name = glob.escape(folder.name)
    for pattern in (f".{name}.*.tmp", f".{name}.*.parts"):
        for temporary in folder.parent.glob(pattern):
            try:
                newest = max(path.stat().st_mtime for path in (temporary, *temporary.iterdir()))
            except FileNotFoundError:
                continue  # its writer has just removed or published it
            if time.time() - newest > ABANDONED_AFTER_S and temporary != but:
                shutil.rmtree(temporary, ignore_errors=True)
