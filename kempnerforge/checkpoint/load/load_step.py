"""Read a step into a state on every rank, and agree on the outcome."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch

from kempnerforge.checkpoint.format.dtypes import DTYPES
from kempnerforge.checkpoint.load.candidates import Candidate, with_retries
from kempnerforge.checkpoint.load.compatibility import check_data, check_parts
from kempnerforge.checkpoint.load.dcp_reader import SafetensorsReader, load_tensors
from kempnerforge.checkpoint.load.load_targets import LoadTargets, find_targets
from kempnerforge.checkpoint.results import RunContext
from kempnerforge.checkpoint.state.train_state import TrainState, rng_name
from kempnerforge.distributed.consensus import ControlGroup, mark_collective
from kempnerforge.errors import CheckpointError, MismatchError, UnreachableCheckpointError


@dataclass
class LoadResult:
    """What one rank read from a step. Only tensors are filled in before all ranks agree."""

    reader: SafetensorsReader
    targets: LoadTargets
    rng: torch.Tensor | None = None
    data_changes: list[str] = field(default_factory=list)
    data_additions: list[str] = field(default_factory=list)
    load_s: float = 0.0


def load(
    candidate: Candidate,
    state: TrainState,
    *,
    same_layout: bool,
    rank: int,
    num_ranks: int = 1,
    parts: Sequence[str],
    excluded: Collection[str] = (),
    context: RunContext,
) -> LoadResult:
    """Read what this rank needs, after checking that the step fits.

    Fills the tensors of the model in place where possible; changes nothing else in ``state``. Not
    collective. ``parts``: a subset of model, optimizer, extra, data, rng. ``excluded``: names of
    extras.

    Raises DamagedCheckpointError, UnreachableCheckpointError, MismatchError.
    """

    def read() -> LoadResult:
        started = time.perf_counter()
        with contextlib.closing(
            SafetensorsReader(candidate.path, known_manifest=candidate.manifest)
        ) as reader:
            _ = reader.objects  # decode now, so that errors are raised before the ranks agree
            check_parts(parts, reader)
            targets = find_targets(
                state, reader, parts=parts, excluded=excluded, rank=rank, num_ranks=num_ranks
            )
            loaded = LoadResult(reader, targets)
            if "data" in parts:
                loaded.data_changes, loaded.data_additions = check_data(reader, state, context)
            wanted, name = dict(targets.tensors), rng_name(rank)
            if "rng" in parts and same_layout and name in reader.index:
                entry = reader.index[name]
                loaded.rng = torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="cpu")
                wanted[name] = loaded.rng
            load_tensors(wanted, reader)
            targets.check_tied()
        loaded.load_s = time.perf_counter() - started
        return loaded

    return with_retries(read, what=str(candidate.path))


def load_together(work: Callable[[], LoadResult], control: ControlGroup) -> LoadResult | str:
    """Run ``work`` on every rank and agree on the outcome.

    Collective: all ranks, on the control group.

    Returns this rank's result, or, on all ranks, why the step is damaged. Raises the same error on
    all ranks for any other failure.
    """
    loaded: LoadResult | None = None
    failure: tuple[str, str] | None = None
    cause: BaseException | None = None
    try:
        loaded = work()
    except CheckpointError as error:
        failure, cause = (type(error).__name__, str(error)), error.__cause__
    except Exception as error:  # noqa: BLE001 - the other ranks wait in the gather below
        failure, cause = ("Exception", f"{type(error).__name__}: {error}"), error
    worst = most_severe(control.gather(failure))
    if worst is None:
        assert loaded is not None
        return loaded
    kind, message = worst
    if kind == "DamagedCheckpointError":
        return message
    types = {"MismatchError": MismatchError, "UnreachableCheckpointError": UnreachableCheckpointError}
    raise mark_collective(types.get(kind, CheckpointError)(message)) from cause


def most_severe(outcomes: Sequence[tuple[str, str] | None]) -> tuple[str, str] | None:
    """Return the failure that all ranks act on; None if every rank loaded the step.

    The order is: unexpected error, unreachable, mismatch, damaged. Damage is last because a damaged
    step is renamed, which must not happen while another rank could not even read it.
    """
    order = ("Exception", "UnreachableCheckpointError", "MismatchError", "DamagedCheckpointError")
    failures = [
        (order.index(outcome[0]) if outcome[0] in order else 0, rank, outcome)
        for rank, outcome in enumerate(outcomes)
        if outcome
    ]
    if not failures:
        return None
    _, rank, (kind, message) = min(failures)
    return kind, f"{message} (rank {rank})" if len(outcomes) > 1 else message
