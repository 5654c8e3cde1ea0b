"""The crash campaign: check all states that crashes after each prefix of a recording could leave."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from support.crash.crash_choices import choices
from support.crash.disk_model import Disk, Op, read_log
from support.crash.file_operations import install, uninstall
from support.crash.file_trees import Tree, read_tree, write_tree
from support.crash.file_watcher import Control, Watch
from support.crash.oracle import CHECKPOINTS, Commit, Oracle, allowed_after, find_commits
from support.crash.save_driver import Plan, save_all
from support.ranks import run_ranks

from kempnerforge.checkpoint.run.owner import OWNER_FILE

STEPS = (1, 2, 3, 4)


@dataclass(frozen=True)
class Recording:
    """All file operations of a few saves, and the files that they left."""

    ops: list[Op]
    attempts: list[Op]
    """All operations, including those that the file system refused."""
    commits: list[Commit]
    tree: Tree
    ranks: int


Case = tuple[int, int, bool]
"""Number of ranks, ``keep_last_n``, and whether direct writes are refused."""
RecordingOf = Callable[[Case], Recording]


@dataclass(frozen=True)
class Tally:
    """Counts of what a campaign tried."""

    operations: int = 0
    states: int = 0
    """Simulated crashes: a prefix of the recording and a choice of the changes that are lost."""
    distinct: int = 0
    """Different trees that the crashes left. Each is recovered and loaded once."""

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            *(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True))
        )


def record(
    base: Path,
    *,
    ranks: int,
    keep_last_n: int,
    no_direct: bool = False,
    mode: str = "async",
    steps: tuple[int, ...] = STEPS,
    wait: bool = False,
) -> Recording:
    """Save a few steps with real processes, in a run folder that is already durable, and record it.

    Unless ``wait`` is set, a save overlaps with the work after it, so that no two recordings are
    alike.
    """
    run_dir = base / "run"
    run_dir.mkdir()
    control, log = base / "control", base / "log"
    Control(control)
    plan = Plan(
        str(run_dir),
        steps,
        keep_last_n=keep_last_n,
        mode=mode,
        wait=wait,
        log=str(log),
        control=str(control),
        no_direct=no_direct,
    )
    for learnt in run_ranks(save_all, ranks, plan):
        assert learnt == {"resumed": 0, "errors": [""] * len(steps), "rejected": []}
    ops = read_log(log)
    return Recording(ops, read_log(log, attempts=True), find_commits(ops), read_tree(run_dir), ranks)


def explore(
    ops: Sequence[Op],
    oracle: Oracle,
    allowed: Callable[[int], set[int | None]],
    *,
    samples: int,
    seed: int,
    start: Tree | None = None,
) -> Tally:
    """Check every crash after every prefix of ``ops``, which begin with the tree ``start``.

    ``allowed`` returns the steps that may be resumed after a number of operations. Fails at the
    first wrong state.
    """
    rng = random.Random(seed)
    disk, states, before = Disk(start), 0, oracle.distinct
    for done in range(len(ops) + 1):
        if done:
            disk.apply(ops[done - 1])
        for choice in choices(disk.units(), rng, samples=samples):
            states += 1
            try:
                oracle.check_tree(disk.crash(choice, rng), allowed(done))
            except Exception as error:
                last = f"{ops[done - 1].op} {ops[done - 1].path}" if done else "nothing"
                raise AssertionError(f"after {done} operations, the last {last}: {error}") from error
    return Tally(len(ops), states, oracle.distinct - before)


def explore_recording(recording: Recording, scratch: Path, *, samples: int, seed: int) -> Tally:
    """Call ``explore`` for a recording of saves."""
    oracle = Oracle(scratch, ranks=recording.ranks)
    commits = recording.commits
    return explore(
        recording.ops, oracle, lambda done: allowed_after(commits, done), samples=samples, seed=seed
    )


def sample_trees(recording: Recording, count: int, seed: int) -> list[tuple[Tree, set[int | None]]]:
    """Return trees that random crashes leave, each with the steps that may be resumed."""
    rng = random.Random(seed)
    found = []
    for done in sorted(rng.sample(range(1, len(recording.ops) + 1), count)):
        disk = Disk()
        for op in recording.ops[:done]:
            disk.apply(op)
        choice = rng.choice(list(choices(disk.units(), rng, samples=5)))
        found.append((disk.crash(choice, rng), allowed_after(recording.commits, done)))
    return found


def explore_recovery(
    tree: Tree, allowed: set[int | None], scratch: Path, *, ranks: int, samples: int, seed: int
) -> Tally:
    """Recover ``tree``, which a crash left, and crash again at every operation of the recovery."""
    run_dir = scratch / "run"
    write_tree(tree, run_dir)
    Control(scratch / "control")
    oracle = Oracle(scratch, ranks=ranks)
    install(Watch(str(run_dir), str(scratch / "log"), str(scratch / "control"), "rank0"))
    try:
        found = oracle.recover(run_dir)
    finally:
        uninstall()
    assert found in allowed
    ops = read_log(scratch / "log")
    return explore(ops, oracle, lambda _: {found}, samples=samples, seed=seed, start=tree)


def train_on(tree: Tree, allowed: set[int | None], scratch: Path) -> None:
    """Continue training in one process from ``tree``, which a crash left: one more save must succeed."""
    run_dir = scratch / "run"
    write_tree(tree, run_dir)
    learnt = save_all(Plan(str(run_dir), (STEPS[-1] + 1,), attempt=2))
    assert (learnt["resumed"] or None) in allowed
    assert learnt["errors"] == [""]
    assert learnt["rejected"] == []
    assert Oracle(scratch, ranks=1).recover(run_dir) == STEPS[-1] + 1
    known = {f"step_{STEPS[-1] + 1:08d}", "latest", OWNER_FILE}
    left = {path.name for path in (run_dir / CHECKPOINTS).iterdir()} - known
    assert not left, f"{left} stays for ever"
