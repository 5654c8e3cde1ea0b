"""Select the faults to try, and check the result of each."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import support.ranks as ranks_module
from support.crash.disk_model import Op, read_log
from support.crash.file_watcher import WRITES, Control
from support.crash.oracle import CHECKPOINTS, Oracle, find_commits
from support.crash.save_driver import Plan, Strike, Struck, save_all
from support.ranks import RanksFailed, run_ranks

from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.run.owner import OWNER_FILE

ALWAYS = 1_000_000
"""As ``count``: all operations from the nth on fail."""
KILLED_STEPS = (1, 2)
"""The steps that ``kill_and_resume`` saves."""


def operations_of_a_save(ops: Sequence[Op]) -> dict[str, list[str]]:
    """Return the operations of the last save in a recording of attempts, with its deletions, by role."""
    first = max(n for n, op in enumerate(ops) if op.op == "mkdir" and op.path.endswith(".tmp"))
    found: dict[str, list[str]] = {}
    for op in ops[first:]:
        found.setdefault(op.role, []).append(op.op)
    return found


def every_strike(operations: dict[str, list[str]]) -> list[Strike]:
    """Return every kind of fault at every operation of every process."""
    found = []
    for role, ops in operations.items():
        for nth, op in enumerate(ops):
            found += [Strike(role, nth, kind) for kind in ("EIO", "ENOSPC", "late_EIO")]
            found += [Strike(role, nth, "ENOSPC", count=ALWAYS)]
            if op in WRITES:
                found += [Strike(role, nth, kind) for kind in ("short", "short_aligned")]
            if role.startswith("writer"):
                found += [Strike(role, nth, "EIO", count=ALWAYS), Strike(role, nth, "kill")]
                found += [Strike(role, nth, "kill", count=ALWAYS)]
    return found


def check_strikes(by_rank: Sequence[Sequence[Struck]]) -> Counter[str]:
    """Check every save under a fault and the one after it, and count how they ended.

    A save under a fault must be committed, or fail alike on all ranks and leave nothing. The one
    after it must be committed.
    """
    counts: Counter[str] = Counter()
    before: set[str] = set()
    for struck, *others in zip(*by_rank, strict=True):
        what = f"{struck.strike}: {struck.hit}, then {struck.after}"
        for other in others:
            assert (other.hit.error, other.after.error) == (struck.hit.error, struck.after.error), what
        name = paths.step_name(struck.hit.step)
        if struck.hit.error:
            rank = struck.strike.role[-1]
            assert f"rank {rank}: " in struck.hit.error, what
            # If the disk keeps failing, the name cannot be taken back. Then the step under it is
            # complete.
            assert struck.strike.count > 1 or name not in struck.hit.names, f"it failed and is there: {what}"
        else:
            assert name in struck.hit.names, what
        in_flight = [one for one in struck.hit.names if one.startswith(".step_") and one.endswith(".tmp")]
        assert not in_flight, what
        assert struck.after.error == "", what
        known = {paths.LATEST, OWNER_FILE, paths.step_name(struck.after.step)}
        left = set(struck.after.names) - before - known
        assert not left, f"{sorted(left)} was left behind by {what}"
        before = set(struck.after.names)
        outcome = "failed cleanly" if struck.hit.error else "committed"
        counts[outcome if struck.fired else "not hit"] += 1
    return counts


def every_kill(ops: Sequence[Op]) -> list[Strike]:
    """Return a kill before every operation of every process in a recording of ``kill_and_resume``.

    There are also kills in the middle of every write, and of the rank behind each operation of its
    writer.
    """
    seen: Counter[str] = Counter()
    found = []
    for op in ops:
        nth, seen[op.role] = seen[op.role], seen[op.role] + 1
        kinds = ["kill"]
        if op.op in WRITES:
            kinds.append("kill_half")
        if op.role.startswith("writer"):
            kinds.append("kill_parent")
        found += [Strike(op.role, nth, kind) for kind in kinds]
    return found


def sample(strikes: Sequence[Strike], count: int, seed: int) -> list[Strike]:
    """Return a seeded sample of ``count`` faults that has every kind and every role, if possible."""
    rng = random.Random(seed)
    groups: dict[tuple[str, str], list[Strike]] = {}
    for strike in strikes:
        groups.setdefault((strike.role, strike.kind), []).append(strike)
    keys = sorted(groups)  # sorted, because the order in which writers were recorded is random
    for key in keys:
        rng.shuffle(groups[key])
    order = sorted(keys, key=lambda _: rng.random())
    picked: list[Strike] = []
    while len(picked) < count and any(groups.values()):
        picked += [groups[key].pop() for key in order if groups[key]]
    return picked[:count]


def kill_and_resume(base: Path, strike: Strike, *, ranks: int = 2) -> str:
    """Save, be killed, and start again. Return how it ended.

    The second start must resume from the newest commit and save the rest.
    """
    base.mkdir()
    run_dir, log = base / "run", base / "log"
    run_dir.mkdir()
    Control(base / "control").arm(strike.role, strike.nth, strike.kind, count=strike.count)
    plan = Plan(str(run_dir), KILLED_STEPS, log=str(log), control=str(base / "control"))
    killed = _is_killed(plan, ranks)
    assert Control(base / "control").fired == 1, strike
    assert killed is not (strike.role.startswith("writer") and strike.kind != "kill_parent"), strike
    committed = [commit.step for commit in find_commits(read_log(log))]
    newest = committed[-1] if committed else 0
    last = KILLED_STEPS[-1] + 1
    for learnt in run_ranks(save_all, ranks, Plan(str(run_dir), (*KILLED_STEPS, last), attempt=2)):
        assert learnt["resumed"] == newest, f"{strike}: {learnt}, committed are {committed}"
        assert learnt["rejected"] == []
        assert not any(learnt["errors"]), learnt
    folder = run_dir / CHECKPOINTS
    assert Oracle(base, ranks=ranks).recover(run_dir) == last
    names = {path.name for path in folder.iterdir()}
    assert names == {paths.step_name(last), paths.LATEST, OWNER_FILE}, f"{strike}: {names}"
    return f"killed, {newest} resumed" if killed else "survived"


def _is_killed(plan: Plan, ranks: int) -> bool:
    try:
        run_ranks(save_all, ranks, plan)
    except RanksFailed as error:
        if "SIGKILL" not in str(error):
            raise
        return True
    return False


def kill_all(base: Path, strikes: Iterable[Strike]) -> Counter[str]:
    """Call ``kill_and_resume`` for each fault and count how they ended."""
    # The remaining ranks get little time, as when a launcher ends them.
    before, ranks_module.SECOND_FAILURE_GRACE_S = ranks_module.SECOND_FAILURE_GRACE_S, 0.3
    try:
        return Counter(kill_and_resume(base / str(n), strike) for n, strike in enumerate(strikes))
    finally:
        ranks_module.SECOND_FAILURE_GRACE_S = before
