"""The validation loss: of the model that is being trained, and of a checkpoint."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from kempnerforge.checkpoint import holds, layout, resume
from kempnerforge.checkpoint.report import RunContext
from kempnerforge.checkpoint.resume import Found
from kempnerforge.checkpoint.state import TrainState
from kempnerforge.config.schema import Geometry, JobConfig
from kempnerforge.data.fingerprint import explain_difference, fingerprint
from kempnerforge.data.loader import eval_batches
from kempnerforge.data.tokens import Samples
from kempnerforge.distributed.world import World
from kempnerforge.errors import DamagedCheckpointError
from kempnerforge.train.build import open_data
from kempnerforge.train.environment import set_determinism
from kempnerforge.train.placement import build_model
from kempnerforge.train.step import TrainStep
from kempnerforge.train.stop import StopSignals


@dataclass(frozen=True)
class Evaluation:
    """What a checkpoint was found to be worth. The same on every rank."""

    step: int
    loss: float
    """Mean over all tokens, as ``eval/loss`` of training."""
    tokens: int
    """Tokens that were predicted, all ranks."""
    geometry: Geometry
    num_ranks: int
    device: str
    data_changes: list[str]
    """How the data differs from those that the step was trained on."""
    wall_s: float
    """From the opening of the data to the loss, the loading of the step included."""


def validation_loss(
    step: TrainStep, samples: Samples, job: JobConfig, geometry: Geometry, *, rank: int
) -> float:
    """Mean loss of the first ``eval.num_batches`` global batches of the validation split.

    Collective: all ranks. Always the same sequences, whatever the layout; consumes no random numbers.
    """
    batches = eval_batches(
        samples,
        num_batches=job.eval.num_batches,
        global_batch_size=geometry.global_batch_size,
        batch_size=job.train.batch_size,
        dp_rank=geometry.dp_rank(rank),
        dp_size=geometry.dp,
    )
    return step.evaluate(batches)


def evaluate_step(
    job: JobConfig, step_folder: Path, *, note: Callable[[str], None] = lambda _text: None
) -> Evaluation:
    """The validation loss of the checkpoint in ``step_folder`` under the layout of ``job``.

    It has the same bits as the ``eval/loss`` that training logged at that step where the promise of bitwise
    equality holds. Takes no lease; writes nothing into the run's folder but a hold, which goes again.

    Collective: all ranks of this start, which it joins and leaves. Blocks: until all are done. ``note`` is
    told on rank 0. Raises ConfigError, DataError and CheckpointError on all ranks.
    """
    set_determinism(job.train.deterministic)
    world = World.start(timeout_s=job.distributed.timeout_s)
    if world.rank != 0:
        note = _say_nothing
    started = time.perf_counter()
    geometry = job.geometry(world.num_ranks)
    dataset = open_data(job, world, StopSignals(), note=note)
    model = build_model(job, geometry, rank=world.rank, device=world.device, draw=False)
    # Nothing is updated, and plain SGD keeps nothing beside the weights.
    optimizer = torch.optim.SGD([one for part in model.parts for one in part.parameters()])
    seed = job.train.seed
    state = TrainState(
        model=model.parts,
        groups=model.groups,
        optimizer={},  # only the model is read
        device=world.device,
        fingerprint=world.control.on_rank0(lambda: fingerprint(dataset, "train", job.train.seq_len, seed)),
    )
    found, data_changes = _load(step_folder, state, world)
    step = model.step(optimizer, geometry, job.train)
    loss = validation_loss(step, dataset.split("val", job.train.seq_len), job, geometry, rank=world.rank)
    world.close()
    return Evaluation(
        step=found.step,
        loss=loss,
        tokens=job.eval.num_batches * geometry.global_batch_size * job.train.seq_len,
        geometry=geometry,
        num_ranks=world.num_ranks,
        device=world.device.type,
        data_changes=data_changes,
        wall_s=time.perf_counter() - started,
    )


def _load(step_folder: Path, state: TrainState, world: World) -> tuple[Found, list[str]]:
    """Fill the model of ``state`` from the step, held by rank 0 meanwhile; with how the data differs.

    Collective: all ranks.
    """
    context = RunContext(allow_changed_data=True, explain_data=explain_difference)
    with contextlib.ExitStack() as stack:

        def take() -> Found:
            stack.enter_context(holds.hold(step_folder, what="kempnerforge eval"))
            step = layout.step_number(step_folder.name)
            return resume.with_retries(lambda: resume.inspect(step_folder, step=step), what=str(step_folder))

        found = world.control.on_rank0(take)
        outcome = resume.load_together(
            lambda: resume.load(
                found,
                state,
                same_layout=False,
                rank=world.rank,
                parts=("model", "data"),
                context=context,
            ),
            world.control,
        )
    if isinstance(outcome, str):
        error = DamagedCheckpointError(f"{outcome}. It was left as it is; choose another step of that run.")
        error.agreed = True
        raise error
    return found, outcome.data_changes


def _say_nothing(_text: str) -> None:
    """What the ranks other than 0 say."""
