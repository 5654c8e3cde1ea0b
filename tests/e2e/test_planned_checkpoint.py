"""What ``plan`` says of a checkpoint is what a run writes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from support.runs import Launcher, make_run

from kempnerforge.checkpoint.format.paths import SHARD_SUFFIX
from kempnerforge.config.schema import (
    load_job,
)
from kempnerforge.plan.optimizer_state import FP32
from kempnerforge.plan.report import make_plan

pytest_plugins = ["support.run_fixtures"]


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, {}),
        (4, {"distributed.dp_replicate": 2}),
        (4, {"distributed.tp": 2}),
        (4, {"distributed.tp": 2, "distributed.pp": 2, "train.batch_size": 2}),
        (2, {"optimizer.name": "muon"}),
        (4, {"distributed.tp": 2, "optimizer.name": "adafactor"}),
        (1, {"optimizer.name": "schedule_free_adamw"}),
        (2, {"model.freeze": ["tok_embeddings", "feed_forward"], "checkpoint.interval": 1}),
    ],
)
def test_plan_files_and_bytes_match_real_checkpoint(
    launcher: Launcher, corpus: Path, tmp_path: Path, ranks: int, layout: dict[str, Any]
) -> None:
    run = make_run(tmp_path, corpus, **{"train.max_steps": 3, "eval.interval": 0}, **layout)
    launcher.finish(run, ranks=ranks)
    folder = run.step_folder(3)
    plan = make_plan(load_job(folder / "config.toml").job, ranks)
    files = {file.name: file.stat().st_size for file in folder.iterdir()}
    assert plan.checkpoint.num_files == len(files)

    written = []
    for name, size in sorted(files.items()):
        if name.endswith(SHARD_SUFFIX):
            with open(folder / name, "rb") as file:
                header = int.from_bytes(file.read(8), "little")
            written.append(size - 8 - header)
    payload = sum(written)
    without_cuda = 16 * ranks
    assert plan.checkpoint.payload_bytes - without_cuda == payload
    assert plan.checkpoint.size_bytes == pytest.approx(sum(files.values()), rel=0.02, abs=4096 * ranks)
    beside = sum(files.values()) - payload
    assert plan.checkpoint.size_bytes - plan.checkpoint.payload_bytes == pytest.approx(
        beside, abs=4096 * ranks
    )

    most = max(place.staged_bytes for place in plan.pipeline)
    largest = FP32 * max(math.prod(entry) for entry in shapes_in(folder))
    each = len(written) // ranks  # with frozen parameters, a rank has two files
    by_rank = [sum(written[begin : begin + each]) for begin in range(0, len(written), each)]
    assert most == pytest.approx(max(by_rank), abs=largest)
    last = [row["checkpoint/written_bytes"] for row in run.rows() if row.get("checkpoint/step") == 3]
    assert [plan.checkpoint.written_bytes] == pytest.approx(last, rel=0.02, abs=2 * 4096 * ranks)


def shapes_in(folder: Path) -> list[list[int]]:
    found = []
    for file in folder.glob(f"*{SHARD_SUFFIX}"):
        raw = file.read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        found += [body["shape"] for name, body in header.items() if name != "__metadata__"]
    return found
