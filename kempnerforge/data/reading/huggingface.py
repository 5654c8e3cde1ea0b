"""What a folder of Hugging Face's ``datasets`` has beside the data.

Without these rules its metadata would be read as text, the results of ``map`` and ``filter`` would be
read beside what they were made from, and test splits would be trained on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

METADATA = frozenset({"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"})
TRAIN = "train"
SHARD = re.compile(r"-(\w+?)(?:-\d{5}-of-\d{5})?\.arrow")
CACHE_PREFIX = "cache-"


def left_out(folder: Path, names: Collection[str]) -> dict[str, str]:
    """Return which of ``names`` in ``folder`` are not read, and why. Empty for other folders.

    ``save_to_disk``: ``state.json`` lists the data files. A ``DatasetDict`` and a cache of
    ``load_dataset``: only the train split is read, if there is one. A download of the Hub: only
    ``snapshots``, which are links to ``blobs``.
    """
    if folder.name.startswith("datasets--") and "snapshots" in names:
        return {
            name: "storage of the Hub; its files are in snapshots" for name in names if name != "snapshots"
        }
    state = _json_object(folder / "state.json") if "state.json" in names else {}
    is_saved = "_data_files" in state
    if not is_saved and METADATA.isdisjoint(set(names) - {"state.json"}):
        return {}
    reasons = {name: "metadata of a Hugging Face dataset" for name in names if name in METADATA}
    splits: list[str] = []
    if "dataset_dict.json" in names:
        splits = list(_json_object(folder / "dataset_dict.json").get("splits") or ())
    elif is_saved:
        data_files = {entry["filename"] for entry in state["_data_files"]}
        for name in names:
            if name.endswith(".arrow") and name not in data_files:
                reasons[name] = "not one of the data files that state.json lists"
    elif "dataset_info.json" in names:
        splits = list(_json_object(folder / "dataset_info.json").get("splits") or ())
    for name in names:
        match = SHARD.search(name)
        split = match[1] if match else name
        if name.startswith(CACHE_PREFIX):
            reasons[name] = "result of map or filter in the cache of a Hugging Face dataset"
        elif TRAIN in splits and split in splits and split != TRAIN:
            reasons[name] = f"the {split} split of a Hugging Face dataset; name it to read it"
    return reasons


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
