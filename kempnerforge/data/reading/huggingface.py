"""What a folder of Hugging Face's ``datasets`` has beside the data to train on.

Without these rules its metadata would be read as text, the results of ``map`` and ``filter`` would be
read beside what they were made from, and test splits would be trained on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

METADATA = frozenset({"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"})
TRAIN = "train"
HELD_OUT = frozenset({"dev", "eval", "evaluation", "test", "testing", "val", "valid", "validation"})
CACHE_FILE = re.compile(r".*?-(\w+?)(?:-\d{5}-of-\d{5})?\.arrow")
DOWNLOADED_FILE = re.compile(r"(\w+)-\d{5}-of-\d{5}(?:-\w+)?\.parquet")


def left_out(folder: Path, names: Collection[str]) -> dict[str, str]:
    """Return which of ``names`` in ``folder`` are not read, and why. Empty for other folders.

    Of a dataset with several splits, only the train split is read. In the folder of a repository of
    the Hub, only ``snapshots`` is read. Of what ``save_to_disk`` wrote, only the files that
    ``state.json`` lists are read.
    """
    if folder.name.startswith("datasets--") and "snapshots" in names:
        reason = "storage of the Hub; its files are in snapshots"
        return {name: reason for name in names if name != "snapshots"}
    reasons = dict(_other_splits(folder, names))
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
    """Yield the files or folders of other splits than train, if there is a train split."""
    if "dataset_dict.json" in names:
        splits = set(_json_object(folder / "dataset_dict.json").get("splits") or ())
        split_of = {name: name for name in names}
    elif "dataset_info.json" in names:
        splits = set(_json_object(folder / "dataset_info.json").get("splits") or ())
        split_of = {name: match[1] for name in names if (match := CACHE_FILE.fullmatch(name))}
    else:
        split_of = {name: match[1] for name in names if (match := DOWNLOADED_FILE.fullmatch(name))}
        splits = {split for split in split_of.values() if split == TRAIN or split in HELD_OUT}
    if TRAIN in splits:
        for name, split in split_of.items():
            if split in splits and split != TRAIN:
                yield name, f"the {split} split of a Hugging Face dataset; name it to read it"


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
