"""Code shared by the tests of ``kempnerforge ckpt``. Their fixtures are in ``ckpt_fixtures``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from kempnerforge.checkpoint.format import paths

CONFIG = """
[train]
seed = 1
[checkpoint]
keep_last_n = 2
keep_best_n = 1
best_metric = "eval/loss"
"""
LOSSES = {10: 4.0, 20: 1.0, 30: 3.0, 40: 2.0}


class Done(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Ckpt = Callable[..., Done]


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / paths.step_name(step)


def shard(run: Path, step: int) -> Path:
    (found,) = step_folder(run, step).glob("*.safetensors")
    return found
