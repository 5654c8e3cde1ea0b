"""Make a valid run folder with many committed steps in seconds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from kempnerforge.checkpoint.format import manifest, paths
from kempnerforge.checkpoint.format.checksums import FileRecord, record_of
from kempnerforge.checkpoint.format.manifest import Provenance
from kempnerforge.checkpoint.format.safetensors_file import ShardItem, plan_image
from kempnerforge.checkpoint.run import metadata
from kempnerforge.checkpoint.save.commit import ExpectedFiles, PlannedFile, PlannedItem

CONFIG = """\
[train]
seed = 1
[checkpoint]
interval = 10
keep_last_n = 2
keep_every_n_steps = 1000
"""
_ITEMS = 20
_ELEMENTS = 8


def make_run(folder: Path, *, steps: int, shards: int) -> None:
    """Make the folder of a run with ``steps`` steps, 10 apart, each of ``shards`` files."""
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True)
    metadata.write(folder, replace(metadata.new(attempt=1, global_batch_size=8), run_id="bench"))
    files = tuple(_planned(number, shards) for number in range(shards))
    index = ExpectedFiles(files).index
    shard_data = {file.name: _bytes_of(file, number) for number, file in enumerate(files)}
    shared = {**shard_data, paths.INDEX: index, paths.CONFIG: CONFIG.encode()}
    records = {name: record_of(data) for name, data in shared.items()}
    for step in range(10, 10 * steps + 1, 10):
        _make_step(checkpoints, step, shared, records, shards)
    (checkpoints / paths.LATEST).symlink_to(paths.step_name(10 * steps))


def _make_step(
    checkpoints: Path, step: int, shared: dict[str, bytes], records: dict[str, FileRecord], shards: int
) -> None:
    path = checkpoints / paths.step_name(step)
    path.mkdir()
    counters = {"step": step, "tokens": 1000 * step, "skipped_steps": 0, "skipped_in_a_row": 0}
    train_state = json.dumps({**counters, "data": {"cursor": {"samples": 8 * step}}}, indent=1).encode()
    for name, data in {**shared, paths.TRAIN_STATE: train_state}.items():
        (path / name).write_bytes(data)
    provenance = Provenance(
        step=step,
        run_id="bench",
        attempt=1,
        parent_step=step - 10 or None,
        reason="interval",
        layout={"num_ranks": shards, "dp_shard": shards},
        versions={"torch": "0"},
        metrics={"train/loss": 1 / step},
    )
    body = manifest.encode(provenance, {**records, paths.TRAIN_STATE: record_of(train_state)})
    (path / paths.MANIFEST).write_bytes(body)


def _planned(number: int, shards: int) -> PlannedFile:
    items = tuple(
        PlannedItem(
            ShardItem(f"model.layers.{item}.weight", "F32", (number * _ELEMENTS,), (_ELEMENTS,)),
            (shards * _ELEMENTS,),
        )
        for item in range(_ITEMS)
    )
    return PlannedFile(paths.shard_name(number, shards), items)


def _bytes_of(file: PlannedFile, number: int) -> bytes:
    image = plan_image(file.shard_items)
    return image.header + bytes([number % 256]) * (image.size_bytes - len(image.header))
