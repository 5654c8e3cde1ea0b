"""Faults of file operations in a run of the harness, and training loops on slow files.

The main thread of the loop must do no file work between steps. On a network file system every
look-up takes a round trip, and all ranks wait for the slowest. ``run_loop`` counts the file work of
the main thread, and holds the operations of other threads until all steps are done.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.crash.errno_campaign import (
    LAST,
    SCENARIOS,
    SOUND,
    Scenario,
    Stopped,
    add_leftovers,
    copy_to,
    in_child,
    train,
)
from support.crash.errno_shim import HOLD, Operation, Shim, Strike
from support.fork_server import PRELOAD
from support.runs import make_run, write_corpus

from kempnerforge import CheckpointManager
from kempnerforge.checkpoint.results import SaveReport
from kempnerforge.checkpoint.run import request_files
from kempnerforge.checkpoint.run.lease import Lease
from kempnerforge.checkpoint.run.resume_report import read_receipts
from kempnerforge.cli import train as harness

LOOP_ENDS = SOUND + 12
MODES = ("async", "async_with_pinned_mem")
_CONFIG = "job.toml"
_SETTINGS: dict[str, Any] = {
    "model.dim": 16,
    "eval.interval": 4,
    "eval.num_batches": 1,
    "checkpoint.interval": 2,
    "checkpoint.keep_last_n": 2,
}
"""Settings like those of the loop of ``errno_campaign.train``, with validation."""


def train_harness(run: Path, *settings: str) -> None:
    """Run ``scripts/train.py`` in ``run``. Raises ``Stopped`` if it ends with an error."""
    from kempnerforge.train import run as running

    errors: list[str] = []
    log_error = running._log_error
    running._log_error = lambda error, world: (errors.append(str(error)), log_error(error, world))
    if status := harness.main([f"--config={run / _CONFIG}", f"--run.dir={run}", *settings]):
        raise Stopped(" ".join(errors), status)


def prepare_harness(run: Path) -> None:
    """Create a run of the harness, with leftovers. A copy of it uses the data of the original."""
    for name in PRELOAD:
        importlib.import_module(name)
    base = run.parent
    corpus = write_corpus(base / "corpus", seed=1)
    made = make_run(base, corpus, **{**_SETTINGS, "data.cache_dir": str(base / "tokens")})
    run.mkdir()
    made.config.rename(run / _CONFIG)
    for steps in (6, 10):
        words = (f"--train.max_steps={steps}", "--checkpoint.keep_last_n=99")
        in_child(lambda words=words: train_harness(run, *words), base / "prepare.log")
    add_leftovers(run)


def _start(run: Path, told: list[int]) -> None:
    poll = CheckpointManager.poll

    def listen(self: CheckpointManager) -> list[SaveReport]:
        reports = poll(self)
        told.extend(one.step for one in reports if not (one.error or one.skipped))
        return reports

    CheckpointManager.poll = listen
    train_harness(run, f"--train.max_steps={LAST}")


def _again(run: Path) -> int:
    train_harness(run, f"--train.max_steps={LAST}", "--checkpoint.keep_last_n=99")
    return read_receipts(run)[-1]["step"]


def _is_of_harness(operation: Operation) -> bool:
    """Return whether an operation is on a file of the harness only, or outside the checkpoints."""
    return not operation.path.startswith(("run/checkpoints/", f"run/{_CONFIG}"))


SCENARIOS["harness"] = Scenario(_start, prepare_harness, again=_again, trains=True, wants=_is_of_harness)


@dataclass(frozen=True)
class LoopOutcome:
    """The behaviour of a training loop between its first step and its end."""

    main: list[list[str]]
    """Kind and path of the operations of the main thread."""
    elsewhere: list[list[str]]
    """Kind and path of the operations of other threads."""
    waits: dict[str, int]
    """Waits of the main thread that ended at their time limit, by module."""
    gave_up: bool
    """Whether the loop waited for an operation that was held."""
    held: int
    output: str


def loop_of_own(run: Path, mode: str) -> None:
    """Run a user's own loop."""
    train(run, steps=LOOP_ENDS - SOUND, mode=mode)


def loop_of_harness(run: Path, mode: str) -> None:
    """Run the loop of the harness."""
    train_harness(run, f"--train.max_steps={LOOP_ENDS}", f"--checkpoint.async_mode={mode}")


LOOPS: dict[str, tuple[str, Callable[[Path, str], None]]] = {
    "own": ("start", loop_of_own),
    "harness": ("harness", loop_of_harness),
}
"""Loop -> the scenario in whose folder it trains, and the function that runs it."""


def run_loop(
    prepared: Path, loop: str, mode: str, base: Path, what: Strike | None = None, *, hold_all: bool = False
) -> LoopOutcome:
    """Train in a copy of ``prepared``. With ``hold_all``, hold each operation that begins between steps."""
    run = copy_to(base, prepared)
    result = base / "loop.json"

    def work() -> None:
        shim = Shim(str(base), what)
        shim.loop.hold_all = hold_all
        _watch(shim)
        shim.install()
        LOOPS[loop][1](run, mode)
        shim.uninstall()
        found = shim.loop
        fields = {"main": found.operations, "elsewhere": sorted(found.elsewhere), "waits": found.waits}
        result.write_text(json.dumps({**fields, "gave_up": found.gave_up, "held": found.held}))

    output = in_child(work, base / "log")
    assert result.exists(), output
    return LoopOutcome(**json.loads(result.read_text()), output=output)


def holds_of(found: LoopOutcome) -> list[Strike]:
    """Return a fault for each operation of other threads in a loop, which holds it."""
    return [Strike(Operation(op, path, 0), HOLD, always=True) for op, path in found.elsewhere]


def _watch(shim: Shim) -> None:
    """Tell ``shim`` when steps begin and end. Let periodic checks of files run all the time.

    The end is the point at which the loop waits for the last commit: in a save that waits, or in
    ``finish``.
    """
    wait, finish, init = CheckpointManager.wait_for_staging, CheckpointManager.finish, Lease.__init__
    save = CheckpointManager.save

    def step(self: CheckpointManager) -> None:
        shim.loop.begin()
        wait(self)

    def end(self: CheckpointManager, *args: Any, **options: Any) -> None:
        shim.loop.end()
        finish(self, *args, **options)

    def save_step(self: CheckpointManager, *args: Any, **options: Any) -> SaveReport:
        if options.get("wait"):
            shim.loop.end()
        return save(self, *args, **options)

    def renew_often(self: Lease, *args: Any, **options: Any) -> None:
        init(self, *args, **{**options, "renew_every_s": 0.01})

    CheckpointManager.wait_for_staging = step
    CheckpointManager.finish = end
    CheckpointManager.save = save_step
    Lease.__init__ = renew_often
    request_files.LOOK_EVERY_S = 0.01
    shim.loop.count_waits()
