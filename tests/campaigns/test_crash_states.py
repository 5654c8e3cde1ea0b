"""Crashes: whatever a power failure leaves of a save, of a commit, of a deletion, the last commit loads."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from support.crash.crash_campaign import (
    Case,
    Recording,
    RecordingOf,
    Tally,
    explore_recording,
    explore_recovery,
    sample_trees,
    train_on,
)
from support.crash.disk_model import Disk, Op, read_log
from support.crash.oracle import CHECKPOINTS, describe
from support.crash.strace import TRACE, changes_seen

pytest_plugins = ["support.crash.fixtures"]

SEED = 20261122
CASES = [(1, 1, False), (2, 2, True), (2, 1, False)]
"""(ranks, keep_last_n, whether direct writes are refused)"""
WHOLE = [(ranks, keep, no_direct) for ranks in (1, 2) for keep in (1, 2) for no_direct in (False, True)]


@pytest.mark.parametrize("case", CASES)
def test_recording_replayed_matches_final_tree(recorded: RecordingOf, case: Case) -> None:
    recording = recorded(case)
    disk = Disk()
    for op in recording.ops:
        disk.apply(op)
    assert describe(disk.now()) == describe(recording.tree)
    assert disk.now() == recording.tree
    ranks, keep, no_direct = case
    assert {op.role for op in recording.ops} >= {"rank0", *(f"writer{rank}" for rank in range(ranks))}
    assert [commit.step for commit in recording.commits] == [1, 2, 3, 4]
    linked = [op for op in recording.ops if op.op == "link" and op.to.endswith(".safetensors")]
    assert len(linked) == 3 * ranks, "each later step links the file of the frozen tensor"
    links = [number for number, op in enumerate(recording.ops, 1) if op.op == "symlink"]
    for commit in recording.commits:  # durable before anything says that it is there
        assert commit.durable < min(number for number in links if number > commit.renamed), commit
    deleted = [op.path for op in recording.ops if op.op == "rename" and op.to.endswith(".deleting")]
    assert deleted == [f"{CHECKPOINTS}/step_{step:08d}" for step in range(1, 5 - keep)]
    assert any(op.op == "pwrite" and len(op.data) % 4096 == 0 for op in recording.ops) is not no_direct


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_recording_has_every_system_call(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from support.crash.crash_campaign import record\n"
        "if __name__ == '__main__': record(Path(sys.argv[1]), ranks=2, keep_last_n=1)\n"
    )
    (tmp_path / "script.py").write_text(script)
    traces = tmp_path / "traces"
    traces.mkdir()
    command = ["strace", *TRACE, "-o", str(traces / "t"), sys.executable, "script.py", str(tmp_path)]
    environment = {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False, text=True)
    if "PTRACE_TRACEME" in done.stderr:
        pytest.skip("may not trace processes here")
    assert done.returncode == 0, done.stderr
    kinds = {"pwrite": "write"}
    ours = Counter((kinds.get(op.op, op.op), op.path) for op in read_log(tmp_path / "log"))
    assert changes_seen(traces, tmp_path / "run") == ours


@pytest.mark.parametrize("case", [pytest.param(CASES[0], marks=pytest.mark.smoke), CASES[1]])
def test_crash_sampled_states_last_commit_loads(recorded: RecordingOf, scratch: Path, case: Case) -> None:
    tally = explore_recording(recorded(case), scratch, samples=1, seed=SEED)
    assert tally.states > 2000
    assert tally.distinct > 300


def is_sync_of(end: str) -> Callable[[Op, Op], bool]:
    return lambda op, _: op.op == "fsync" and op.path.endswith(end)


FORGOTTEN_SYNCS: dict[str, Callable[[Op, Op], bool]] = {
    "of the shards": is_sync_of(".safetensors"),
    "of a small file": is_sync_of("train_state.json"),
    "of the manifest": is_sync_of("manifest.json"),
    "of the hidden folder": is_sync_of(".tmp"),
    "of the commit": lambda op, before: op.op == "fsync" and before.to.startswith(f"{CHECKPOINTS}/step_"),
    "of the deletion": lambda op, before: op.op == "fsync" and before.to.endswith(".deleting"),
    "of the run's folder": lambda op, _: op.op == "fsync" and op.path == ".",
}


@pytest.mark.parametrize("which", FORGOTTEN_SYNCS)
def test_oracle_missing_sync_is_found(recorded: RecordingOf, scratch: Path, which: str) -> None:
    whole = recorded(CASES[0])
    pairs = list(zip(whole.ops, whole.ops[:1] + whole.ops, strict=False))
    kept = [not FORGOTTEN_SYNCS[which](op, before) for op, before in pairs]
    assert not all(kept)
    # The promise stays what it was: a commit counts from the operation behind which its last sync stood.
    commits = [
        dataclasses.replace(one, renamed=sum(kept[: one.renamed]), durable=sum(kept[: one.durable]))
        for one in whole.commits
    ]
    ops = list(itertools.compress(whole.ops, kept))
    with pytest.raises(AssertionError, match=r"after \d+ operations"):
        explore_recording(dataclasses.replace(whole, ops=ops, commits=commits), scratch, samples=1, seed=SEED)


def test_crash_during_recovery_last_commit_loads(recorded: RecordingOf, scratch: Path) -> None:
    assert recover_many(recorded(CASES[1]), scratch, count=12, samples=1).states > 500


def recover_many(recording: Recording, scratch: Path, *, count: int, samples: int) -> Tally:
    tally = Tally()
    for number, (tree, allowed) in enumerate(sample_trees(recording, count, SEED)):
        folder = scratch / str(number)
        folder.mkdir()
        tally += explore_recovery(tree, allowed, folder, ranks=recording.ranks, samples=samples, seed=SEED)
    return tally


def test_crash_then_training_resumes(recorded: RecordingOf, scratch: Path) -> None:
    train_on_many(recorded(CASES[1]), scratch, count=4)


def train_on_many(recording: Recording, scratch: Path, *, count: int) -> None:
    for number, (tree, allowed) in enumerate(sample_trees(recording, count, SEED + 1)):
        train_on(tree, allowed, scratch / f"on{number}")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", WHOLE)
def test_crash_all_states_last_commit_loads(recorded: RecordingOf, scratch: Path, case: Case) -> None:
    recording = recorded(case)
    print(f"{case}: {explore_recording(recording, scratch / 'a', samples=150, seed=SEED)}")
    print(f"{case}, in a recovery: {recover_many(recording, scratch, count=40, samples=20)}")
    train_on_many(recording, scratch, count=10)
