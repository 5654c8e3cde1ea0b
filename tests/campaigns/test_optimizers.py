"""Every optimizer, on every layout, in every mode: killed, resumed, and compared bit for bit.

    python -m pytest -m slow tests/campaigns/test_optimizers.py                         # all of it
    KEMPNERFORGE_SEED=7 python -m pytest tests/campaigns/test_optimizers.py             # another slice

A case trains in a loop of its own until all ranks are killed at a random step, with saves in flight. Then it
resumes. On the same layout every later loss and every final weight must have the bits of a run that was never
stopped; on another layout the state must have the bits that the checkpoint has, by name.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.optimizers import OPTIMIZERS, PLAIN_ONLY, Net, make, train_step
from support.ranks import RanksFailed, gloo_group, run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, parallelize_module

from kempnerforge import (
    AsyncCheckpointMode,
    CheckpointConfig,
    CheckpointManager,
    SafetensorsReader,
    TrainState,
)
from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.format.dtypes import DTYPES
from kempnerforge.checkpoint.load.dcp_reader import load_tensors

STEPS = 9
RANKS = {"one": 1, "fsdp2": 2, "tp2": 2}
LAYOUTS = [("one", "one"), ("fsdp2", "fsdp2"), ("tp2", "tp2"), ("one", "fsdp2"), ("fsdp2", "one")]
MODES = [mode.value for mode in AsyncCheckpointMode]
SEED = int(os.environ.get("KEMPNERFORGE_SEED", "12"))


@dataclass(frozen=True)
class Case:
    """One combination."""

    optimizer: str
    before: str
    after: str
    """Layouts before and after the kill."""
    mode: str
    early: bool
    """Whether the optimizer has state already when it is handed over."""

    def __str__(self) -> str:
        return f"{self.optimizer}-{self.before}-{self.after}-{self.mode}-{'early' if self.early else 'late'}"

    @property
    def kill_at(self) -> int:
        """The step after which all ranks are killed."""
        return random.Random(f"{SEED}:{self}").randint(1, STEPS - 1)


CASES = [
    Case(name, *layouts, mode, early)
    for name, layouts, mode, early in itertools.product(OPTIMIZERS, LAYOUTS, MODES, (False, True))
    if layouts == ("one", "one") or name not in PLAIN_ONLY
]


def place(model: nn.Module, where: str) -> None:
    """Lay a model out on all ranks."""
    if where == "one":
        return
    mesh = init_device_mesh("cpu", (RANKS[where],), mesh_dim_names=(where,))
    if where == "fsdp2":
        for layer in model.children():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return
    plan: dict[str, ParallelStyle] = {
        name: ColwiseParallel(output_layouts=Replicate()) for name, _ in model.named_children()
    }
    parallelize_module(model, mesh, plan)


class Loop:
    """A training loop of a user's own."""

    def __init__(self, case: Case, where: str, run_dir: Path) -> None:
        rank = dist.get_rank()
        torch.manual_seed(0)
        self.model = Net()
        place(self.model, where)
        self.optimizer = make(case.optimizer, self.model)
        torch.manual_seed(rank if where == "fsdp2" else 0)
        if case.early:
            train_step(self.model, self.optimizer, STEPS)
        self.state = TrainState(model=self.model, optimizer=self.optimizer)
        self.manager = CheckpointManager(
            CheckpointConfig.model_validate({"interval": 2, "async_mode": case.mode, "keep_last_n": STEPS}),
            state=self.state,
            run_dir=run_dir,
            control_group=gloo_group() if dist.get_world_size() > 1 else None,
        )

    def train(self, *, kill_at: int = 0) -> list[float]:
        """Losses by step, None where the steps were done before the resume."""
        losses: list[float] = [float("nan")] * self.state.step
        while self.state.step < STEPS:
            waits = self.manager.wait_for_staging
            losses.append(train_step(self.model, self.optimizer, self.state.step, before_update=waits))
            self.state.advance()
            self.manager.after_step(self.state)
            if self.state.step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        self.manager.finish(self.state)
        return losses

    def bits(self) -> dict[str, torch.Tensor]:
        """All tensors of model and optimizer, whole."""
        found = self.state.tensors()
        return {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in found.items()}


def begin_and_die(case: Case, folder: str) -> None:
    loop = Loop(case, case.before, Path(folder, "killed"))
    loop.manager.resume(loop.state)
    loop.train(kill_at=case.kill_at)


def go_on(case: Case, folder: str) -> dict[str, Any]:
    loop = Loop(case, case.after, Path(folder, "killed"))
    with loop.manager as ckpt:
        receipt = ckpt.resume(loop.state)
        resumed = loop.bits()
        losses = loop.train()
    found = {"step": receipt.step, "resumed": resumed, "losses": losses, "end": loop.bits()}
    if case.before == case.after:
        whole = Loop(case, case.after, Path(folder, "whole"))
        with whole.manager as ckpt:
            ckpt.resume(whole.state)
            found["whole_losses"], found["whole_end"] = whole.train(), whole.bits()
    return found


def stored(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a step, whole, without generators."""
    reader = SafetensorsReader(folder / "killed/checkpoints" / paths.step_name(step))
    names = [name for name in reader.index if not name.startswith("rng.")]
    heads = {name: reader.index.head(name) for name in names}
    tensors = {name: torch.empty(shape, dtype=DTYPES[dtype]) for name, (dtype, shape) in heads.items()}
    load_tensors(tensors, reader)
    return tensors


def check(case: Case, folder: Path) -> None:
    """Run one case."""
    with pytest.raises(RanksFailed, match="SIGKILL"):
        run_ranks(begin_and_die, RANKS[case.before], case, str(folder))
    for found in run_ranks(go_on, RANKS[case.after], case, str(folder)):
        step = found["step"]
        if case.mode == "disabled":
            assert step == case.kill_at // 2 * 2
        if step:
            want = stored(folder, step)
            assert found["resumed"].keys() == want.keys()
            for name, tensor in want.items():
                assert torch.equal(tensor, found["resumed"][name]), f"{name} of step {step}"
        if case.before == case.after:
            assert found["losses"][step:] == found["whole_losses"][step:]
            assert found["end"].keys() == found["whole_end"].keys()
            for name, tensor in found["whole_end"].items():
                assert torch.equal(tensor, found["end"][name]), name


def sample(count: int) -> list[Case]:
    """A slice that a seed chooses, with every layout and every mode in it."""
    generator = random.Random(SEED)
    chosen = []
    for number in range(count):
        of_layout = [case for case in CASES if (case.before, case.after) == LAYOUTS[number % len(LAYOUTS)]]
        chosen.append(
            generator.choice([case for case in of_layout if case.mode == MODES[number % len(MODES)]])
        )
    return chosen


@pytest.mark.smoke
@pytest.mark.parametrize("case", sample(5), ids=str)
def test_optimizer_killed_and_resumed_has_same_bits(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_optimizer_of_each_kind_resumes_bitwise(name: str, tmp_path: Path) -> None:
    of_kind = [case for case in CASES if case.optimizer == name]
    check(random.Random(f"{SEED}:{name}").choice(of_kind), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_optimizer_matrix_has_same_bits(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)
