"""The validation loss: of the model that is being trained, and of a checkpoint."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.load import candidates, load_step
from kempnerforge.checkpoint.load.candidates import Candidate
from kempnerforge.checkpoint.results import RunContext
from kempnerforge.checkpoint.retention import read_locks
from kempnerforge.checkpoint.state.train_state import TrainState
from kempnerforge.config.schema import JobConfig, ParallelDims
from kempnerforge.data.fingerprint import explain_difference, fingerprint
from kempnerforge.data.loader import eval_batches
from kempnerforge.data.tokens import Samples
from kempnerforge.distributed.context import DistributedContext
from kempnerforge.errors import DamagedCheckpointError
from kempnerforge.train.environment import set_determinism
from kempnerforge.train.model_setup import build_model
from kempnerforge.train.setup import open_data
from kempnerforge.train.step import Batch, TrainStep
from kempnerforge.train.termination.signals import StopSignals


@dataclass(frozen=True)
class Evaluation:
    """What a checkpoint was found to be worth. The same on every rank."""

    step: int
    loss: float
    """Mean over all tokens, as ``eval/loss`` of training."""
    tokens: int
    """Tokens that were predicted, all ranks."""
    geometry: ParallelDims
    num_ranks: int
    device: str
    data_changes: list[str]
    """How the data differs from those that the step was trained on."""
    wall_s: float
    """From the opening of the data to the loss, the loading of the step included."""


LOOK_EVERY_S = 1.0
MOST_BATCHES = 64
"""A validation looks for a stop about once per ``LOOK_EVERY_S``, at the latest after so many batches."""


class BreakableBatches:
    """Batches of a validation that end early, on all ranks alike, when the run is to stop.

    ``look`` is collective: it is given the milliseconds since the last look and returns whether to stop, and
    the most milliseconds that any rank gave.
    """

    def __init__(self, batches: Iterable[Batch], look: Callable[[int], tuple[bool, int]]) -> None:
        self._batches = batches
        self._look = look
        self.broken_off = False

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches. Collective: all ranks look after the same ones."""
        count, left, looked_at = 1, 1, time.monotonic()
        for batch in self._batches:
            if left == 0:
                stop, slowest_ms = self._look(int(1000 * (time.monotonic() - looked_at)))
                if stop:
                    self.broken_off = True
                    return
                count = left = batches_between_looks(slowest_ms / 1000 / count)
                looked_at = time.monotonic()
            yield batch
            left -= 1


def batches_between_looks(seconds_per_batch: float) -> int:
    """Return after how many batches a validation looks for a stop again."""
    return max(1, min(MOST_BATCHES, int(LOOK_EVERY_S / max(seconds_per_batch, 1e-6))))


def validation_loss(
    step: TrainStep,
    samples: Samples,
    job: JobConfig,
    geometry: ParallelDims,
    *,
    rank: int,
    look: Callable[[int], tuple[bool, int]] | None = None,
) -> float | None:
    """Mean loss of the first ``eval.num_batches`` global batches of the validation split.

    ``look``, see ``BreakableBatches``, may break it off; then the result is None.

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
    if look is None:
        return step.evaluate(batches)
    breakable = BreakableBatches(batches, look)
    loss = step.evaluate(breakable)
    return None if breakable.broken_off else loss


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
    world = DistributedContext.start(timeout_s=job.distributed.timeout_s)
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
        fingerprint=world.control.run_on_rank0(
            lambda: fingerprint(dataset, "train", job.train.seq_len, seed)
        ),
    )
    found, data_changes = _load(step_folder, state, world)
    step = model.step(optimizer, geometry, job.train)
    loss = validation_loss(step, dataset.split("val", job.train.seq_len), job, geometry, rank=world.rank)
    assert loss is not None
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


def _load(step_folder: Path, state: TrainState, world: DistributedContext) -> tuple[Candidate, list[str]]:
    """Fill the model of ``state`` from the step, held by rank 0 meanwhile; with how the data differs.

    Collective: all ranks.
    """
    context = RunContext(allow_changed_data=True, explain_data=explain_difference)
    with contextlib.ExitStack() as stack:

        def take() -> Candidate:
            stack.enter_context(read_locks.lock_for_reading(step_folder, what="kempnerforge eval"))
            step = paths.step_number(step_folder.name)
            return candidates.with_retries(
                lambda: candidates.inspect(step_folder, step=step), what=str(step_folder)
            )

        found = world.control.run_on_rank0(take)
        outcome = load_step.load_together(
            lambda: load_step.load(
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
