"""What a folder of Hugging Face's ``datasets`` has beside the data to train on.

Without these rules its metadata would be read as text, the results of ``map`` and ``filter`` would be
read beside what they were made from, old revisions would be read beside new ones, and test splits would be
trained on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from kempnerforge.data.reading.splits import held_out_by_name, is_held_out, is_train
from kempnerforge.errors import DataError

METADATA = frozenset({"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"})
TRAIN = "train"
CACHE_FILE = re.compile(r".*?-(\w+?)(?:-\d{5}-of-\d{5})?\.arrow")
REPOSITORY = "datasets--"
"""How the folders of the Hub's cache begin."""


def left_out(folder: Path, names: Collection[str]) -> dict[str, str]:
    """Return which of ``names`` in ``folder`` are not read, and why. Empty for other folders.

    Of a dataset with several splits, those that are held out are not read. In the folder of a
    repository of the Hub, only ``snapshots`` is read, and there only one revision. Of what
    ``save_to_disk`` wrote, only the files that ``state.json`` lists are read.

    Raises :class:`DataError` if it is not known which revision to read.
    """
    if folder.name.startswith(REPOSITORY) and "snapshots" in names:
        reason = "storage of the Hub; its files are in snapshots"
        return {name: reason for name in names if name != "snapshots"}
    if folder.name == "snapshots" and folder.parent.name.startswith(REPOSITORY):
        return _other_revisions(folder, names)
    reasons = {
        name: f"the {split} split beside a train split; name it to read it"
        for name, split in held_out_by_name(folder, names)
    }
    reasons |= {
        name: f"the {split} split of a Hugging Face dataset; name it to read it"
        for name, split in _other_splits(folder, names)
    }
    state = _json_object(folder / "state.json") if "state.json" in names else {}
    data_files = state.get("_data_files")
    if data_files is None and METADATA.isdisjoint(set(names) - {"state.json"}):
        return reasons
    for name in names:
        if name in METADATA:
            reasons[name] = "metadata of a Hugging Face dataset"
        elif name.startswith("cache-") and name.endswith(".arrow"):
            reasons[name] = "result of map or filter in the cache of a Hugging Face dataset"
        elif data_files and name.endswith(".arrow") and {"filename": name} not in data_files:
            reasons[name] = "not one of the data files that state.json lists"
    return reasons


def _other_splits(folder: Path, names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the files or folders that are not to be trained on by the metadata, and their splits."""
    if "dataset_dict.json" in names:
        splits = _splits_in(folder / "dataset_dict.json")
        split_of = {name: name for name in names}
    elif "dataset_info.json" in names:
        splits = _splits_in(folder / "dataset_info.json")
        split_of = {name: match[1] for name in names if (match := CACHE_FILE.fullmatch(name))}
    else:
        return
    if TRAIN in splits:
        others = splits - {TRAIN}
    elif any(is_train(split) for split in splits):
        others = {split for split in splits if is_held_out(split)}
    else:
        return
    yield from ((name, split) for name, split in split_of.items() if split in others)


def _other_revisions(folder: Path, names: Collection[str]) -> dict[str, str]:
    """Return the revisions in ``snapshots`` other than that of ``refs/main``."""
    revisions = sorted(name for name in names if (folder / name).is_dir())
    if len(revisions) < 2:
        return {}
    try:
        main = (folder.parent / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        main = ""
    if main not in revisions:
        newest = max(revisions, key=lambda name: (folder / name).stat().st_mtime_ns)
        raise DataError(
            f"{folder} has several revisions, and refs/main names none of them: {', '.join(revisions)}. "
            f"Name the one to read, such as the newest: {folder / newest}"
        )
    reason = f"another revision than {main}, which refs/main names; name it to read it"
    return {name: reason for name in revisions if name != main}


def _splits_in(path: Path) -> set[str]:
    splits = _json_object(path).get("splits")
    return {split for split in splits if isinstance(split, str)} if isinstance(splits, list | dict) else set()


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
