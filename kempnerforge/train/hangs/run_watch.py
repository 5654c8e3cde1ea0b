"""Run the hang detector during one attempt, from the resume to the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kempnerforge.distributed.store_channel import StoreBoard
from kempnerforge.torch_compat import get_default_store
from kempnerforge.train.hangs.detector import HangWatch, Rules, SaveInFlight
from kempnerforge.train.setup import Run


@contextmanager
def watched(run: Run) -> Iterator[None]:
    """Run the hang detector of this rank while the body runs."""

    def save_in_flight() -> SaveInFlight | None:
        in_flight = run.ckpt.in_flight
        return SaveInFlight(*in_flight) if in_flight is not None else None

    attempt = run.ckpt.context.attempt
    watch = HangWatch(
        run.progress,
        Rules.of(run.job.train, run.job.distributed.timeout_s),
        rank=run.world.rank,
        num_ranks=run.world.num_ranks,
        attempt=attempt,
        connect=lambda: _connect(attempt),
        stacks=run.control.stopping.stacks,
        save_in_flight=save_in_flight,
    )
    watch.start()
    try:
        yield
    finally:
        watch.close()


def _connect(attempt: int) -> StoreBoard:
    """Open a separate connection to the store: the code that hangs may be using the one of the training."""
    store: Any = get_default_store()
    return StoreBoard(store.clone(), f"hangs/{attempt}")
