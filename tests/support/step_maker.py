"""Create steps of format 1 without torch, in any layout, and damage them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from kempnerforge.checkpoint.format import manifest, paths, tensor_index
from kempnerforge.checkpoint.format.checksums import record_of
from kempnerforge.checkpoint.format.manifest import Provenance
from kempnerforge.checkpoint.format.safetensors_file import ShardItem, plan_image
from kempnerforge.checkpoint.format.tensor_index import Chunk, TensorEntry

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes of a chunk."""

CONFIG = """
[train]
seed = {seed}
[checkpoint]
keep_last_n = {keep_last_n}
"""


def arrays(step: int) -> dict[str, np.ndarray]:
    """Return a small state that differs between steps."""
    generator = np.random.default_rng(step)
    return {
        "model.w": generator.random((6, 4), dtype=np.float32),
        "model.b": np.arange(5, dtype=np.float32),
        "optimizer.state.w.exp_avg": generator.random((6, 4), dtype=np.float32),
        "optimizer.state.w.step": np.array(step, dtype=np.float32),
        "rng.rank_00000": generator.integers(0, 255, 40, dtype=np.uint8),
    }


def write_step(
    folder: Path,
    step: int,
    *,
    state: Mapping[str, np.ndarray] | None = None,
    boxes: Mapping[str, Sequence[Box]] | None = None,
    config: str | None = CONFIG.format(seed=1, keep_last_n=2),
    objects: Mapping[str, Any] | None = None,
    **provenance: Any,
) -> Path:
    """Write a committed step. ``boxes``: tensor -> its chunks, of which the n-th is in the n-th file."""
    path = folder / paths.step_name(step)
    path.mkdir(parents=True)
    state = arrays(step) if state is None else state
    files: dict[str, bytes] = {}
    entries: dict[str, TensorEntry] = {}
    boxes = dict(boxes or {})
    number_of_files = max([1, *(len(split) for split in boxes.values())])
    for number in range(number_of_files):
        name = paths.shard_name(number, number_of_files)
        here = {}
        for tensor, array in state.items():
            split = boxes.get(tensor, [((0,) * array.ndim, array.shape)])
            if number < len(split):
                here[tensor] = split[number]
        items = [ShardItem(tensor, _dtype(state[tensor]), *box) for tensor, box in here.items()]
        image = plan_image(items)
        data = image.header
        for place in image.order:
            item = items[place]
            cut = tuple(slice(at, at + size) for at, size in zip(item.offsets, item.sizes, strict=True))
            data += np.ascontiguousarray(state[item.name][cut]).tobytes()
        files[name] = data
        for item, begin in zip(items, image.begins, strict=True):
            chunk = Chunk(name, begin, begin + item.size_bytes, item.offsets, item.sizes)
            before = entries.get(item.name)
            chunks = (*before.chunks, chunk) if before else (chunk,)
            entries[item.name] = TensorEntry(item.dtype, state[item.name].shape, chunks)
    files[paths.INDEX] = tensor_index.encode(entries)
    counters = {"step": step, "tokens": 0, "skipped_steps": 0, "skipped_in_a_row": 0}
    files[paths.TRAIN_STATE] = json.dumps({**counters, **(objects or {})}).encode()
    if config is not None:
        files[paths.CONFIG] = config.encode()
    for name, data in files.items():
        (path / name).write_bytes(data)
    known = Provenance(**{"step": step, "run_id": "r", "attempt": 1, "reason": "interval", **provenance})
    records = {name: record_of(data) for name, data in files.items()}
    (path / paths.MANIFEST).write_bytes(manifest.encode(known, records))
    return path


def resign(path: Path, **changes: Any) -> None:
    """Write the current files, and ``changes``, into the manifest of the step in ``path``."""
    body = json.loads((path / paths.MANIFEST).read_text())
    del body["digest"]
    for name in body["files"]:
        record = record_of((path / name).read_bytes())
        body["files"][name] = {"size_bytes": record.size_bytes, "xxh3_128": list(record.xxh3_128)}
    body.update(changes)
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    body["digest"] = xxhash.xxh3_128_hexdigest(canonical)
    (path / paths.MANIFEST).write_text(json.dumps(body))


def flip_byte(path: Path, position: int) -> None:
    """Change one byte of a file. A negative position is counted from the end."""
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def _dtype(array: np.ndarray) -> str:
    return {"float32": "F32", "uint8": "U8", "float64": "F64", "int64": "I64"}[array.dtype.name]
