"""Splits of a dataset, by the names of files and folders.

A name is of a split if its first word is a name of one, as in ``test_sft-00000-of-00001.parquet``, or
the first such word follows the name of the dataset, as in ``c4-validation.00000-of-00008.json.gz``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kempnerforge.data.reading.heads import FORMAT_OF_NAME, Head, inspect_head, plain_suffix
from kempnerforge.errors import DataError

TRAIN = frozenset({"train", "training"})
HELD_OUT = frozenset({"dev", "eval", "evaluation", "test", "testing", "val", "valid", "validation"})

SPLIT_WORD = re.compile(
    rf"(?P<before>|.*?[-_.])(?P<word>{'|'.join(sorted(TRAIN | HELD_OUT))})(?=[-_.\d]|$)", re.IGNORECASE
)
SHARD = re.compile(r"(?:[-_.]?\d+)?(?:-of-\d+)?(?:\.[a-z]+){1,2}", re.IGNORECASE)
"""The rest of a name that has only numbers and suffixes after the split."""

BESIDE_RECORDS = frozenset({"README.md", "dataset_info.json", "state.json"})
"""Files that the folder of a split may have beside those of records."""


@dataclass(frozen=True)
class NamedSplit:
    """The split that a name says."""

    split: str
    """Such as ``test``, ``test_sft`` or ``c4-validation``."""
    is_train: bool
    dataset: str
    """What stands before the split."""
    kind: str
    """``records``, ``folder``, ``.json`` or ``.txt``."""


def is_train(split: str) -> bool:
    """Return whether the first word of ``split`` is a name of the train split."""
    return _first_word(split) in TRAIN


def is_held_out(split: str) -> bool:
    """Return whether the first word of ``split`` is a name of a split that is not trained on."""
    return _first_word(split) in HELD_OUT


def held_out_by_name(folder: Path, names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the files and folders of held-out splits, and the split, if there is a train split too.

    Folders of other files are left as they are: only files of records count, folders with nothing
    else, and text whose name says only the split. JSON counts if it is JSON Lines.
    """
    datasets: dict[tuple[str, str], dict[NamedSplit, list[str]]] = {}
    for name in sorted(names):
        if named := split_of_name(name):
            datasets.setdefault((named.dataset, named.kind), {}).setdefault(named, []).append(name)
    checks = {".json": _is_json_lines, "folder": _holds_records}
    for (_, kind), splits in datasets.items():
        if kind in checks and _has_both(splits):
            splits = {named: files for named, files in splits.items() if checks[kind](folder / files[0])}
        if _has_both(splits):
            yield from (
                (name, named.split) for named, files in splits.items() if not named.is_train for name in files
            )


def split_of_name(name: str) -> NamedSplit | None:
    """Return the split of a file or folder, or None if its name says none."""
    match = SPLIT_WORD.match(name)
    if match is None:
        return None
    dataset, rest = match["before"], name[match.end() :]
    suffix = plain_suffix(name)
    if suffix in FORMAT_OF_NAME:
        kind = "records"
    elif suffix == ".json" or (suffix == ".txt" and not dataset and SHARD.fullmatch(rest)):
        kind = suffix
    elif not suffix and not dataset:
        kind = "folder"
    else:
        return None
    split = name[: match.end()] + re.split(r"\.|[-_]?\d", rest)[0]
    return NamedSplit(split, match["word"].lower() in TRAIN, dataset, kind)


def split_notes(paths: Iterable[Path], *, of_folder: bool) -> list[str]:
    """Return a line for each folder of which several splits are read, or one that is usually held out.

    ``paths`` are files of records that are read, ``of_folder`` because their folder was named. A
    single split whose files were named is what the user wants.
    """
    by_folder: dict[tuple[Path, bool], dict[str, NamedSplit]] = {}
    for path in paths:
        if named := split_of_name(path.name):
            by_folder.setdefault((path.parent, True), {})[named.split] = named
        elif named := split_of_name(path.parent.name):
            by_folder.setdefault((path.parent.parent, False), {})[named.split] = named
    return [
        f"{folder}: it is read with the splits {', '.join(splits)}; to read only some, name their files"
        if len(splits) > 1
        else f"{folder}: its split {next(iter(splits))} is read, which is usually held out"
        for (folder, are_files), splits in by_folder.items()
        if len(splits) > 1 or (of_folder and are_files and not any(s.is_train for s in splits.values()))
    ]


def _first_word(split: str) -> str:
    match = SPLIT_WORD.match(split)
    return match["word"].lower() if match and not match["before"] else ""


def _has_both(splits: Iterable[NamedSplit]) -> bool:
    return {named.is_train for named in splits} == {True, False}


def _holds_records(folder: Path) -> bool:
    names = {name for _, _, files in os.walk(folder) for name in files if not name.startswith(".")}
    names -= BESIDE_RECORDS
    return bool(names) and all(plain_suffix(name) in FORMAT_OF_NAME for name in names)


def _is_json_lines(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        head = inspect_head(path)
    except DataError:
        return False  # reading the file reports it
    return isinstance(head, Head) and head.format == "jsonl"
