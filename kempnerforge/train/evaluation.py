"""Compute the validation loss of the model in training, or of a checkpoint."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kempnerforge.checkpoint.format import evaluation_weights, paths
from kempnerforge.checkpoint.format.step_info import StepView
from kempnerforge.checkpoint.load import candidates, load_step
from kempnerforge.checkpoint.load.candidates import Candidate
from kempnerforge.checkpoint.results import RunContext
from kempnerforge.checkpoint.retention import read_locks
from kempnerforge.checkpoint.state.train_state import TrainState
from kempnerforge.config.schema import JobConfig, ParallelDims
from kempnerforge.data.fingerprint import compare_data, fingerprint
from kempnerforge.data.loader import eval_batches
from kempnerforge.data.map_dataset import MapSamples
from kempnerforge.data.tokens import Samples
from kempnerforge.distributed.consensus import mark_collective
from kempnerforge.distributed.context import DistributedContext
from kempnerforge.errors import DamagedCheckpointError, DataError
from kempnerforge.train.data_setup import open_data, val_splits
from kempnerforge.train.environment import set_determinism
from kempnerforge.train.loss_step import LossStep
from kempnerforge.train.mixture_run import weighted_loss
from kempnerforge.train.model_setup import ParallelModel, build_model
from kempnerforge.train.optimizer import Optimizers, build_optimizer
from kempnerforge.train.step import TrainStep
from kempnerforge.train.termination.signals import StopSignals


@dataclass(frozen=True)
class Evaluation:
    """The result of evaluating a checkpoint. It is the same on every rank."""

    step: int
    loss: float
    """Mean over all targets that count, computed as the ``eval/loss`` of training."""
    tokens: int
    """Number of targets on all ranks that count, or of the items that ``loss(batch)`` counted."""
    geometry: ParallelDims
    num_ranks: int
    device: str
    data_changes: list[str]
    """Differences between these data and the data that the step was trained on."""
    wall_s: float
    """Time from opening the data to the loss, including the load of the step."""
    unit: str = "tokens"
    """What ``tokens`` counts: ``tokens`` or ``items``."""
    source_losses: dict[str, float] = field(default_factory=dict[str, float])
    """Mean loss of each source of a mixture, of which ``loss`` is the mean by the weights at that step."""


QUERY_STOP_INTERVAL_S = 1.0
MOST_BATCHES = 64
"""Maximum number of batches between two checks for a stop, which are ``QUERY_STOP_INTERVAL_S``
apart if possible."""


class InterruptibleBatches:
    """Batches of a validation that end early, after the same batch on all ranks, when the run must stop.

    ``query_stop`` is collective. Its argument is the milliseconds since the last call. It returns
    whether to stop, and the largest argument of any rank.
    """

    def __init__(self, batches: Iterable[Any], query_stop: Callable[[int], tuple[bool, int]]) -> None:
        self._batches = batches
        self._query_stop = query_stop
        self.interrupted = False

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches. Collective: all ranks call ``query_stop`` after the same batches."""
        count, left, queried_at = 1, 1, time.monotonic()
        for batch in self._batches:
            if left == 0:
                stop, slowest_ms = self._query_stop(int(1000 * (time.monotonic() - queried_at)))
                if stop:
                    self.interrupted = True
                    return
                count = left = batches_between_queries(slowest_ms / 1000 / count)
                queried_at = time.monotonic()
            yield batch
            left -= 1


def batches_between_queries(seconds_per_batch: float) -> int:
    """Return the number of batches until a validation checks again whether to stop."""
    return max(1, min(MOST_BATCHES, int(QUERY_STOP_INTERVAL_S / max(seconds_per_batch, 1e-6))))


def validation_loss(
    step: TrainStep,
    samples: Samples | MapSamples,
    job: JobConfig,
    geometry: ParallelDims,
    *,
    rank: int,
    query_stop: Callable[[int], tuple[bool, int]] | None = None,
    source: str = "",
) -> float | None:
    """Return the mean loss of the first ``eval.num_batches`` global batches of the validation split.

    The sequences are the same in every layout. No random numbers are used. ``query_stop`` may
    interrupt the validation (see ``InterruptibleBatches``). The result is then None. ``source`` is the
    name of the samples in a mixture.

    Collective: all ranks. Raises DataError on all ranks if no target counts.
    """
    batches = eval_batches(
        samples,
        num_batches=job.eval.num_batches,
        global_batch_size=geometry.global_batch_size,
        batch_size=job.train.batch_size,
        dp_rank=geometry.dp_rank(rank),
        dp_size=geometry.dp,
    )
    interruptible = None if query_stop is None else InterruptibleBatches(batches, query_stop)
    loss = step.evaluate(batches if interruptible is None else interruptible)
    if interruptible is not None and interruptible.interrupted:
        return None
    if step.num_evaluated == 0:
        of_source = f' of source "{source}"' if source else ""
        raise mark_collective(
            DataError(
                f"nothing counts in the first eval.num_batches = {job.eval.num_batches} batches of the "
                f"validation split{of_source}: all targets are left out of the loss. Raise eval.num_batches "
                "or train.seq_len, or set eval.interval = 0"
            )
        )
    return loss


def validation_losses(
    step: TrainStep,
    samples: Mapping[str, Samples | MapSamples],
    job: JobConfig,
    geometry: ParallelDims,
    *,
    rank: int,
    query_stop: Callable[[int], tuple[bool, int]] | None = None,
) -> dict[str, float] | None:
    """Return the loss of each of ``samples``, one after the other, as ``validation_loss`` does.

    None if one of the validations was interrupted. Collective: all ranks.
    """
    losses: dict[str, float] = {}
    for name, part in samples.items():
        loss = validation_loss(step, part, job, geometry, rank=rank, query_stop=query_stop, source=name)
        if loss is None:
            return None
        losses[name] = loss
    return losses


def evaluate_step(job: JobConfig, step_folder: Path) -> Evaluation:
    """Return the validation loss of the checkpoint in ``step_folder`` under the layout of ``job``.

    Where bitwise equality is promised, it has the same bits as the ``eval/loss`` that training
    logged at that step. The function takes no lease. It adds only a read lock to the run's folder,
    and removes it again.

    Collective: all ranks. The process groups are joined at the beginning and left at the end.
    Blocks: until all ranks are done. Raises ConfigError, DataError and CheckpointError on all
    ranks.
    """
    set_determinism(job.train.deterministic)
    world = DistributedContext.start(timeout_s=job.distributed.timeout_s)
    started = time.perf_counter()
    geometry = job.geometry(world.num_ranks)
    # The phases of a mixture remain where they were, whatever the size of the batches here.
    trained = world.control.run_on_rank0(lambda: StepView.open(step_folder).config().get("train", {}))
    size = trained.get("global_batch_size")
    dataset = open_data(job, world, StopSignals(), needs_val=True, samples_per_step=size)
    model = build_model(
        job,
        geometry,
        rank=world.rank,
        device=world.device,
        init_weights=False,
        has_tokens=dataset.has_tokens,
    )
    loaded = optimizer_for_evaluation(job, model, step_folder, world)
    # Plain SGD has no state. No update is made.
    optimizer = loaded or torch.optim.SGD([param for part in model.parts for param in part.parameters()])
    seed = job.train.seed
    state = TrainState(
        model=model.parts,
        groups={group.name: group.names for group in model.groups},
        optimizer=loaded or {},
        device=world.device,
        fingerprint=world.control.run_on_rank0(
            lambda: fingerprint(dataset, "train", job.train.seq_len, seed)
        ),
    )
    candidate, data_changes = load_model(
        step_folder, state, world, parts=("model", "data"), what="kempnerforge eval"
    )
    step = model.step(optimizer, geometry, job.train)
    losses, tokens = {}, 0
    for name, part in val_splits(job, dataset).items():
        losses |= validation_losses(step, {name: part}, job, geometry, rank=world.rank) or {}
        tokens += step.num_evaluated
    cursor = world.control.run_on_rank0(lambda: StepView.open(step_folder).train_state().get("samples"))
    world.close()
    return Evaluation(
        step=candidate.step,
        loss=weighted_loss(losses, dataset.split("train", job.train.seq_len), cursor or 0),
        source_losses={name: loss for name, loss in losses.items() if name},
        tokens=tokens,
        geometry=geometry,
        num_ranks=world.num_ranks,
        device=world.device.type,
        data_changes=data_changes,
        wall_s=time.perf_counter() - started,
        unit="items" if isinstance(step, LossStep) else "tokens",
    )


def optimizer_for_evaluation(
    job: JobConfig, model: ParallelModel, step_folder: Path, world: DistributedContext
) -> Optimizers | None:
    """Return the optimizer whose state a step is loaded with, to compute the weights to evaluate.

    None if these are the weights of the step. Collective: all ranks. Raises ConfigError and
    CheckpointError on all ranks.
    """
    if not world.control.run_on_rank0(
        lambda: evaluation_weights.are_others(StepView.open(step_folder).train_state())
    ):
        return None
    return build_optimizer(model.parts, job.optimizer, model.device, model.groups)


def load_model(
    step_folder: Path, state: TrainState, world: DistributedContext, *, parts: Sequence[str], what: str
) -> tuple[Candidate, list[str]]:
    """Load ``parts`` of ``state`` from the step, which rank 0 locks for reading meanwhile.

    Optimizers that ``state`` has are loaded too.
    Return the step, and with "data" in ``parts`` the differences between its data and the current
    ones. ``what`` describes the reader in the lock. Collective: all ranks.
    """
    context = RunContext(allow_changed_data=True, explain_data=compare_data)
    parts = [*parts, *(["optimizer"] if state.optimizers else [])]
    with contextlib.ExitStack() as stack:

        def take() -> Candidate:
            stack.enter_context(read_locks.lock_for_reading(step_folder, what=what))
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
                parts=parts,
                context=context,
            ),
            world.control,
        )
    if isinstance(outcome, str):
        error = DamagedCheckpointError(f"{outcome}. It was left as it is; choose another step of that run.")
        error.agreed = True
        raise error
    outcome.targets.apply()
    return found, outcome.data_changes
