"""Start a run, or run a command, while one file operation fails, on a folder with every kind of leftover.

``prepare`` creates the folder. Each case copies it and forks a process in which one operation
fails. Then another process starts the run once more without faults, and ``check`` compares the
folder with what is promised. ``errno_training`` has the cases of the harness and of the training
loop.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import shutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.crash.errno_shim import DELAY, Operation, Shim, Strike
from support.step_maker import flip_byte, resign, write_step

from kempnerforge import CheckpointConfig, CheckpointManager, TrainState
from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.load import candidates
from kempnerforge.checkpoint.retention import pins
from kempnerforge.checkpoint.run import lease, metadata
from kempnerforge.checkpoint.tools import rollback, verify
from kempnerforge.cli import app
from kempnerforge.errors import EXIT_BAD_CONFIG, EXIT_FAULT, KempnerForgeError

SOUND, DAMAGED, LATE, PINNED, FOREIGN = 8, 10, 12, 2, 7
"""Steps of the prepared folder: the newest one to resume from, and others by their kind."""
LAST = 11
"""The step at which the start of a case ends."""
CASE_TIMEOUT_S = 120.0
_PRELOAD = ("torch._dynamo", "torch.optim", "kempnerforge.cli.ckpt", "kempnerforge.cli.report")
"""Modules that every case would otherwise import itself."""
_FOREIGN = ("notes.txt", "mine/data.bin", "step_9.bak/x")
_FOREIGN_STEPS = (paths.step_name(FOREIGN), paths.temporary_name(paths.step_name(16), 1))


@dataclass(frozen=True)
class Outcome:
    """The result of a case, and of the start after it."""

    error: str
    """The error message of the faulty part as a user reads it; empty if it succeeded."""
    is_ours: bool
    """Whether the error was one of ``kempnerforge.errors``."""
    status: int
    committed: int
    """The newest step that was reported as committed to the faulty part; 0 for none."""
    output: str
    fired: int
    resumed: int
    """The step from which the start after it resumed."""
    after: str
    """The error of that start."""


class Stopped(Exception):
    """A command or a training ended with a proper error."""

    def __init__(self, error: str, status: int) -> None:
        super().__init__(error)
        self.status = status


def train(
    run: Path, *, steps: int, keep_last_n: int = 2, mode: str = "disabled", told: list[int] | None = None
) -> int:
    """Run a user's own loop. Return the step that it resumed from.

    The steps that are reported as committed are added to ``told``.
    """
    import torch

    torch.manual_seed(5)
    model = torch.nn.Linear(8, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    state = TrainState(model=model, optimizer=optimizer)
    config = CheckpointConfig.model_validate({"async_mode": mode, "interval": 2, "keep_last_n": keep_last_n})
    committed = [] if told is None else told
    with CheckpointManager(config, state=state, run_dir=run) as ckpt:
        began = ckpt.resume(state).step
        for _ in range(steps):
            model(torch.randn(4, 8)).square().mean().backward()
            ckpt.wait_for_staging()
            optimizer.step()
            optimizer.zero_grad()
            state.advance()
            reports = ckpt.after_step(state)
            committed += [one.step for one in reports if not (one.error or one.skipped)]
        ckpt.finish(state)
        committed += [one.step for one in ckpt.poll() if not (one.error or one.skipped)]
    return began


def prepare_own(run: Path) -> None:
    """Create a run of ``train``, with leftovers."""
    for name in _PRELOAD:
        importlib.import_module(name)
    for steps in (6, 4):
        in_child(lambda steps=steps: train(run, steps=steps, keep_last_n=99), run.with_name("prepare.log"))
    add_leftovers(run)


def add_leftovers(run: Path) -> None:
    """Add everything that attempts and people may leave in the folders of a run of two attempts.

    Steps 2 (pinned), 4, 6 and 8 are intact. Step 10 has a damaged shard. Step 12 was committed by
    the first attempt after the second had resumed from 6. Step 7 is of another run, which also has
    a save in flight.
    """
    folder = run / "checkpoints"
    shutil.copytree(folder / paths.step_name(DAMAGED), folder / paths.step_name(LATE))
    late = folder / paths.step_name(LATE)
    resign(late, step=LATE, attempt=1)
    flip_byte(next((folder / paths.step_name(DAMAGED)).glob("*.safetensors")), -1)
    pins.pin(folder, PINNED, note="for a paper")
    sound = folder / paths.step_name(4)
    for name in (paths.temporary_name(paths.step_name(14), 1), ".step_00000001.deleting"):
        shutil.copytree(sound, folder / name)
    (folder / ".step_00000001.deleting" / paths.MANIFEST).unlink()
    for name in (".latest.99.tmp", "holds/step_00000004.0123456789abcdef.json", *_FOREIGN):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    os.utime(folder / "holds/step_00000004.0123456789abcdef.json", (1.0, 1.0))
    for number, name in zip((FOREIGN, 16), _FOREIGN_STEPS, strict=True):
        write_step(folder, number, run_id="other", attempt=1)
        (folder / paths.step_name(number)).rename(folder / name)
    for name in (".run.json.99.tmp", ".nonce-00112233445566ff"):
        (run / name).write_text(name)


def start(run: Path, told: list[int]) -> None:
    """Start the run and train three steps."""
    train(run, steps=LAST - SOUND, told=told)


def roll_back(run: Path, _told: list[int]) -> None:
    """Run ``kempnerforge ckpt rollback RUN 6``."""
    command("ckpt", "rollback", run, "6")


def undo(run: Path, _told: list[int]) -> None:
    """Undo a rollback that was made before the faults began."""
    command("ckpt", "rollback", run, "--undo")


def fork(run: Path, _told: list[int]) -> None:
    """Run ``kempnerforge ckpt fork``."""
    command("ckpt", "fork", run / "checkpoints" / paths.step_name(6), run / "forked")


def look(run: Path, _told: list[int]) -> None:
    """Run commands that change nothing or little."""
    folder = run / "checkpoints"
    for words in (
        ("ckpt", "ls", run),
        ("ckpt", "explain", run),
        ("ckpt", "explain", run, "12"),
        ("ckpt", "verify", folder / paths.step_name(6)),
        ("ckpt", "inspect", folder / paths.LATEST),
        ("ckpt", "pin", run, "6"),
        ("ckpt", "unpin", run, "6"),
        ("ckpt", "prune", run),
        ("report", run),
        ("unblock", run),
    ):
        command(*words)


def command(*words: object) -> None:
    """Run ``kempnerforge``. Raises ``Stopped`` if it fails."""
    sys.argv = ["kempnerforge", *map(str, words)]
    errors: list[str] = []
    end = app._exit
    app._exit = lambda error, status: (errors.append(error), end(error, status))
    try:
        app.main()
    except SystemExit as ended:
        if ended.code not in (None, 0):
            raise Stopped(
                " ".join([*errors, f"({' '.join(map(str, words))})"]), int(str(ended.code))
            ) from None
    finally:
        app._exit = end


@dataclass(frozen=True)
class Scenario:
    """Something that is done to a run's folder."""

    act: Callable[[Path, list[int]], None]
    """The action. It receives the folder, and a list to which it adds the steps reported as committed."""
    prepare: Callable[[Path], None] = prepare_own
    again: Callable[[Path], int] = lambda run: train(run, steps=0)
    """Starts the run once more and returns the step that it resumes from."""
    trains: bool = False
    """Whether it has committed the step ``LAST`` when it ends without an error."""
    wants: Callable[[Operation], bool] = lambda _: True
    """Selects the operations that may fail."""


SCENARIOS = {
    "start": Scenario(start, trains=True),
    "rollback": Scenario(roll_back),
    "undo": Scenario(undo),
    "fork": Scenario(fork),
    "look": Scenario(look),
}


def before(scenario: str, run: Path) -> None:
    """Do what a scenario needs in addition to the prepared folder."""
    if scenario == "undo":
        rollback.roll_back(run, 6, progress=lambda *_: None)


def record(prepared: Path, scenario: str, base: Path) -> list[Operation]:
    """Return the operations of a scenario without faults."""
    run = copy_to(base, prepared)
    found = base / "operations.json"

    def work() -> None:
        before(scenario, run)
        shim = Shim(str(base))
        shim.install()
        SCENARIOS[scenario].act(run, [])
        shim.uninstall()
        found.write_text(json.dumps([vars(one) for one in shim.operations]))

    output = in_child(work, base / "log")
    assert found.exists(), output
    operations = [Operation(**one) for one in json.loads(found.read_text())]
    return [one for one in operations if SCENARIOS[scenario].wants(one)]


def strike(prepared: Path, scenario: str, base: Path, what: Strike) -> Outcome:
    """Run one case."""
    run = copy_to(base, prepared)
    result = base / "result.json"

    def work() -> None:
        candidates.RETRY_DELAYS_S = (0.01, 0.01, 0.01)
        lease._MOST_LOOKS = 3
        before(scenario, run)
        shim = Shim(str(base), what)
        error, is_ours, status, told = "", True, 0, list[int]()
        shim.install()
        try:
            SCENARIOS[scenario].act(run, told)
        except Stopped as ended:
            error, status = str(ended), ended.status
        except KempnerForgeError as failed:
            error, status = str(failed), failed.exit_status
        except BaseException as failed:  # noqa: BLE001 - it is the outcome
            error, is_ours = "".join(traceback.format_exception(failed)), False
        finally:
            shim.uninstall()
        fields = {
            "is_ours": is_ours,
            "status": status,
            "committed": max(told, default=0),
            "fired": shim.fired,
        }
        result.write_text(json.dumps({"error": error, **fields}))

    output = in_child(work, base / "log")
    assert result.exists(), f"{what}: the process died or hung\n{output}"
    resumed = base / "resumed.json"
    after = in_child(lambda: resumed.write_text(json.dumps(SCENARIOS[scenario].again(run))), base / "log")
    return Outcome(
        **json.loads(result.read_text()),
        output=output,
        resumed=json.loads(resumed.read_text()) if resumed.exists() else 0,
        after="" if resumed.exists() else after,
    )


def check(prepared: Path, scenario: str, base: Path, what: Strike, found: Outcome) -> str:
    """Check that the case and the start after it kept every promise. Return a word for the statistics."""
    folder = base / "run" / "checkpoints"
    where = f"{scenario}: {what}\n{found.error}\n{found.output}"
    assert found.is_ours, where
    assert "Traceback" not in found.output, where
    assert len(found.error.splitlines()) <= 1, where
    assert found.status in ((EXIT_FAULT, EXIT_BAD_CONFIG) if found.error else (0,)), where
    assert found.error or not SCENARIOS[scenario].trains or found.committed == LAST, where
    assert not found.after, f"{where}\nthe start after it: {found.after}"
    is_set_back = _is_set_back(scenario, base / "run")
    newest = max(found.committed, 6 if is_set_back else SOUND)
    assert found.resumed >= newest, f"{where}\nresumed {found.resumed}, and {newest} was committed"
    assert verify.verify(folder / paths.step_name(found.resumed)).sound, where
    # No step is lost: its bytes exist under some name, unless retention deleted it.
    kept = {_identity(path) for path in folder.iterdir() if path.is_dir()}
    for step in (PINNED, SOUND, DAMAGED, LATE):
        name = paths.step_name(step)
        may_go = step == SOUND and found.resumed > SOUND + 1
        assert may_go or _identity(prepared / "checkpoints" / name) in kept, f"{where}\n{name} is gone"
    assert (folder / paths.step_name(PINNED)).is_dir(), where
    for name in _FOREIGN:
        assert (folder / name).read_text() == name, where
    for name in _FOREIGN_STEPS:
        assert _files(folder / name) == _files(prepared / "checkpoints" / name), (
            f"{where}\n{name} was touched"
        )
    left = [path.name for path in [*folder.iterdir(), *(base / "run").iterdir()]]
    left = [
        name
        for name in left
        if name not in _FOREIGN_STEPS and name.startswith(".") and name.endswith((".tmp", ".deleting"))
    ]
    assert not left, f"{where}\nleft behind after a sound start: {left}"
    if not found.fired:
        return "not hit"
    return "stopped with one line" if found.error else "went on"


def _is_set_back(scenario: str, run: Path) -> bool:
    record_now = metadata.read(run)
    assert record_now is not None
    return scenario in ("rollback", "undo") and bool(record_now.rollbacks)


def run_all(prepared: Path, scenario: str, scratch: Path, strikes: Sequence[Strike]) -> Counter[str]:
    """Run all cases. Raise AssertionError with the messages of all that failed."""
    counts: Counter[str] = Counter()
    wrong = []
    for number, what in enumerate(strikes):
        base = scratch / f"{scenario}-{number}"
        try:
            counts[check(prepared, scenario, base, what, strike(prepared, scenario, base, what))] += 1
        except AssertionError as error:
            wrong.append(str(error))
        shutil.rmtree(base, ignore_errors=True)
    assert not wrong, f"{len(wrong)} of {len(strikes)} cases are wrong:\n\n" + "\n\n".join(wrong[:20])
    return counts


def sample(strikes: Sequence[Strike], count: int, seed: int) -> list[Strike]:
    """Return a seeded sample of ``count`` cases that has every fault and every operation, if possible."""
    rng = random.Random(seed)
    groups: dict[tuple[str, str], list[Strike]] = {}
    for one in strikes:
        if one.fault != DELAY:
            groups.setdefault((one.fault, one.operation.op), []).append(one)
    picked = [rng.choice(group) for _, group in sorted(groups.items())]
    rng.shuffle(picked)
    return picked[:count]


def copy_to(base: Path, prepared: Path) -> Path:
    """Copy a prepared run into the new folder ``base``."""
    base.mkdir()
    shutil.copytree(prepared, base / "run", symlinks=True)
    return base / "run"


def _identity(step: Path) -> tuple[tuple[str, bytes], ...]:
    return tuple((path.name, path.read_bytes()) for path in sorted(step.glob("*")) if path.is_file())


def _files(step: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in step.glob("*")}


def in_child(work: Callable[[], object], log: Path) -> str:
    """Run ``work`` in a separate process and return its output. Kill the process if it hangs."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            gc.freeze()  # otherwise a garbage collection would copy all pages
            fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            os.dup2(fd, 1)
            os.dup2(fd, 2)
            sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - pytest has put its own there
            sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
            work()
            status = 0
        except BaseException:  # noqa: BLE001 - it ends here
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    deadline = time.monotonic() + CASE_TIMEOUT_S
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        if time.monotonic() > deadline:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            break
        time.sleep(0.002)
    return log.read_text(errors="replace")


def describe(values: Any) -> str:
    """Return counts as text."""
    return ", ".join(f"{count} {what}" for what, count in sorted(values.items()))
