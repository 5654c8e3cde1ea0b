"""``kill -9`` at any moment, then the same command: nothing committed is lost, and the bits are the same.

Every kill ends all ranks of an attempt at once. Moments come from a seed: after so many rows of metrics, so
long after the start, while a checkpoint is in flight, and before the n-th operation on a file of the
checkpoint folder, in the rank's own process, half of a write done.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.patch_target import patch_target
from support.polling import wait_until
from support.run_files import tensor_digests
from support.runs import Attempt, Fault, Launcher, Run, make_run

pytest_plugins = ["support.run_fixtures"]

REPO = Path(__file__).parents[2]
PUBLISH = patch_target("kempnerforge.fsio:publish")
DELETE_TREE = patch_target("kempnerforge.fsio:delete_tree")
LOAD_TENSORS = patch_target("kempnerforge.checkpoint.load.load_step:load_tensors")
WRITE_SHARD = patch_target("kempnerforge.checkpoint.save.writer_client:Writer.write")
INVALIDATE = patch_target("kempnerforge.checkpoint.retention.pruner:Retention._invalidate")
STEPS, KEEP = 60, 2
SETTINGS = {
    "train.max_steps": STEPS,
    "checkpoint.interval": 3,
    "checkpoint.keep_last_n": KEEP,
    "eval.interval": 6,
    "scheduler.name": "cosine",
}


@dataclass(frozen=True)
class Kill:
    """How one attempt is to die: by itself, or by the test when ``wait_for_moment`` returns."""

    name: str
    faults: tuple[Fault, ...] = ()
    wait_for_moment: Callable[[Run, Attempt, int], None] | None = None
    """Is given the number of the attempt."""


def after_rows(count: int, delay_s: float) -> Kill:
    """``delay_s`` after the attempt has logged ``count`` rows."""

    def wait_for_moment(run: Run, attempt: Attempt, number: int) -> None:
        _await(lambda: sum(row["attempt"] == number for row in run.rows()) >= count, attempt)
        time.sleep(delay_s)

    return Kill(f"{delay_s * 1e3:.0f} ms after {count} rows", (), wait_for_moment)


def after_start(delay_s: float) -> Kill:
    """``delay_s`` after the start: in the set-up, the resume, or the first steps."""
    return Kill(f"{delay_s * 1e3:.0f} ms after the start", (), lambda *_: time.sleep(delay_s))


def in_flight(count: int, delay_s: float) -> Kill:
    """``delay_s`` after the test has seen the ``count``-th checkpoint of this attempt in flight."""

    def wait_for_moment(run: Run, attempt: Attempt, number: int) -> None:
        seen: set[str] = set()

        def found() -> bool:
            seen.update(name for name in run.unfinished() if name.endswith(f".{number}.tmp"))
            return len(seen) >= count

        _await(found, attempt)
        time.sleep(delay_s)

    return Kill(f"{delay_s * 1e3:.0f} ms into checkpoint {count} of the attempt", (), wait_for_moment)


def at_operation(number: int, *, half: bool = False, rank: int = 0, below: str = "/checkpoints/") -> Kill:
    """Before the ``number``-th change that ``rank`` makes to the files of a folder in this attempt."""
    arguments = {"number": number, "below": below, "half": half, "rank": rank}
    name = f"{'half way through' if half else 'before'} operation {number} of rank {rank} below {below}"
    return Kill(name, (("kill_at_file_operation", arguments),))


def at_call(target: str, call: int = 1, *, after: bool = False, rank: int = 0) -> Kill:
    """Before, or right after, the ``call``-th call of a function."""
    arguments = {"target": target, "call": call, "after": after, "rank": rank}
    return Kill(f"{'after' if after else 'before'} {target} {call}", (("kill_at_call", arguments),))


def _await(condition: Callable[[], bool], attempt: Attempt, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"the moment to kill did not come\n{attempt.output()}"
        time.sleep(0.001)


def where_it_hit(run: Run, number: int, newest_before: int | None) -> str:
    """What attempt ``number``, which has just been killed, was doing, judged by what it left."""
    names, committed = run.unfinished(), run.committed()
    if not any(receipt["attempt"] == number for receipt in run.receipts()):
        return "set-up or resume"
    if any(name.endswith(f".{number}.tmp") for name in names):
        return "mid-save" if committed else "mid-save, before the first commit"
    if not committed:
        return "before the first commit"
    if committed[0] == newest_before:
        return "training"
    link = run.checkpoints / "latest"
    behind = not link.is_symlink() or os.readlink(link) != run.step_folder(committed[0]).name
    if behind or len(committed) > KEEP or any(name.endswith(".deleting") for name in names):
        return "between commit and cleanup"
    return "training, after a commit"


def kill_once(launcher: Launcher, run: Run, ranks: int, kill: Kill) -> str:
    """Start the run's command and kill it; returns where the kill hit. Checks what must always hold."""
    number = next_attempt(run)
    newest, left_over = max(run.sound(), default=None), run.unfinished()
    attempt = launcher.start(run, ranks=ranks, faults=kill.faults)
    if kill.wait_for_moment is not None:
        kill.wait_for_moment(run, attempt, number)
        attempt.kill()
    ended = attempt.wait()
    assert ended.statuses == [-signal.SIGKILL] * ranks, f"{kill.name} did not kill\n{ended.output}"
    sound = run.sound()
    assert sound == run.committed(), f"{kill.name}: a committed step is not sound"
    assert newest is None or sound[0] >= newest, f"{kill.name}: the newest committed step was lost"
    assert_resumed_from(run, number, newest, left_over)
    return where_it_hit(run, number, newest)


def next_attempt(run: Run) -> int:
    """Number of the attempt that begins next. One that is killed before it could count itself has none."""
    return run.record["attempt"] + 1 if (run.folder / "run.json").exists() else 1


def assert_resumed_from(run: Run, number: int, newest: int | None, left_over: list[str]) -> None:
    """Attempt ``number``, if it came that far, began at step ``newest`` and swept what others left."""
    mine = [receipt for receipt in run.receipts() if receipt["attempt"] == number]
    if not mine:
        return
    assert (mine[0]["source"], mine[0]["step"]) == (
        ("fresh start", 0) if newest is None else ("resume", newest)
    )
    assert mine[0]["rejected"] == []
    assert set(left_over).isdisjoint(run.unfinished()), "hidden folders survived the next start"


def assert_same_bits(run: Run, reference: Run) -> None:
    """Every row that counts, and the last checkpoint, are the reference's."""
    expected, found = reference.counting(), run.counting()
    assert sorted(found) == sorted(expected) == list(range(STEPS + 1))
    for step in expected:
        assert found[step] == expected[step], f"step {step}"
    last = tensor_digests(run.step_folder(STEPS))
    assert last == tensor_digests(reference.step_folder(STEPS))
    assert any(name.startswith("optimizer.") for name in last)
    assert any(name.startswith("rng.") for name in last)
    assert run.unfinished() == []
    assert run.committed()[0] == STEPS
    assert len(run.committed()) == KEEP


@pytest.fixture(scope="module")
def references(
    launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Run]:
    """By number of ranks, a run that nobody stopped."""
    made: dict[int, Run] = {}

    def reference(ranks: int) -> Run:
        if ranks not in made:
            run = make_run(tmp_path_factory.mktemp(f"reference_{ranks}"), corpus, **SETTINGS)
            launcher.finish(run, ranks=ranks)
            made[ranks] = run
        return made[ranks]

    return reference


def campaign(seed: int, ranks: int) -> list[Kill]:
    """Fourteen kills: six around the first commit, three of them surely before it, then others in drawn
    order."""
    draw = random.Random(seed)
    anyone = draw.randrange(ranks)
    early = [
        at_operation(draw.randint(1, 12), half=draw.random() < 0.5, below="/cache/"),
        at_operation(draw.randint(2, 8), half=True),
        at_call(PUBLISH),
        # On a quick machine the next two may come after the first commit.
        after_rows(draw.randint(1, 3), draw.uniform(0, 0.005)),
        after_start(draw.uniform(0.0, 0.4)),
        at_call(PUBLISH, after=True),
    ]
    later = [
        after_start(draw.uniform(0.2, 1.0)),
        at_call(LOAD_TENSORS, after=draw.random() < 0.5, rank=anyone),
        after_rows(draw.randint(1, 9), draw.uniform(0, 0.03)),
        in_flight(draw.randint(1, 2), draw.uniform(0, 0.004)),
        at_operation(draw.randint(10, 40), half=draw.random() < 0.5),
        at_call(WRITE_SHARD, draw.randint(1, 2), rank=anyone),
        at_call(INVALIDATE),
        at_call(DELETE_TREE),
    ]
    draw.shuffle(later)
    return early + later


@pytest.mark.parametrize(
    ("ranks", "mode", "seed"), [(1, "async", 11), (2, "disabled", 12), (2, "async_with_pinned_mem", 13)]
)
def test_run_killed_fourteen_times_has_same_bits(
    launcher: Launcher,
    corpus: Path,
    tmp_path: Path,
    references: Callable[[int], Run],
    ranks: int,
    mode: str,
    seed: int,
) -> None:
    changes = {"data.cache_dir": str(tmp_path / "cache"), "checkpoint.async_mode": mode}
    run = make_run(tmp_path, corpus, **SETTINGS, **changes)
    run_campaign(launcher, run, references(ranks), ranks, seed)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("seed", range(100, 110))
def test_run_killed_under_many_seeds_has_same_bits(
    launcher: Launcher, corpus: Path, tmp_path: Path, references: Callable[[int], Run], ranks: int, seed: int
) -> None:
    run = make_run(tmp_path, corpus, **SETTINGS, **{"data.cache_dir": str(tmp_path / "cache")})
    run_campaign(launcher, run, references(ranks), ranks, seed)


@pytest.mark.smoke
def test_run_killed_in_a_save_has_same_bits(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    settings = SETTINGS | {"train.max_steps": 12, "checkpoint.async_mode": "async_with_pinned_mem"}
    whole, run = (make_run(tmp_path / name, corpus, **settings) for name in ("whole", "killed"))
    launcher.finish(whole, ranks=2)
    assert kill_once(launcher, run, 2, at_call(PUBLISH, 3)) == "mid-save"
    newest, left_over = run.sound()[0], run.unfinished()
    launcher.finish(run, ranks=2)
    assert_resumed_from(run, 2, newest, left_over)
    assert run.receipts()[-1]["bitwise"]
    assert run.counting() == whole.counting()
    assert tensor_digests(run.step_folder(12)) == tensor_digests(whole.step_folder(12))


def run_campaign(launcher: Launcher, run: Run, reference: Run, ranks: int, seed: int) -> None:
    hits = []
    for kill in campaign(seed, ranks):
        hits.append(kill_once(launcher, run, ranks, kill))
        print(f"{ranks} ranks: {kill.name}: {hits[-1]}; left {run.committed()}")
    newest, left_over = max(run.sound(), default=None), run.unfinished()
    launcher.finish(run, ranks=ranks)
    assert_resumed_from(run, run.record["attempt"], newest, left_over)
    assert_same_bits(run, reference)
    print(f"{len(hits)} kills: {dict(Counter(hits))}")
    assert len(hits) == 14
    assert any("before the first commit" in hit for hit in hits)
    assert "mid-save" in hits
    assert "between commit and cleanup" in hits
    assert "set-up or resume" in hits


def names_in(folder: Path) -> set[str]:
    """Files and folders of a run, but for those inside checkpoints."""
    return {str(path.relative_to(folder)) for path in [*folder.iterdir(), *folder.glob("checkpoints/*")]}


SHORT = {"train.max_steps": 4, "checkpoint.interval": 2, "checkpoint.keep_last_n": 1, "eval.interval": 0}


@pytest.mark.slow
@pytest.mark.parametrize("half", [False, True], ids=["before", "half way through"])
def test_run_killed_at_every_file_operation_resumes(
    launcher: Launcher, corpus: Path, tmp_path: Path, half: bool
) -> None:
    whole = make_run(tmp_path / "whole", corpus, **SHORT)
    launcher.finish(whole)
    litter: dict[str, set[str]] = {}
    number = 0
    for number in range(1, 1000):
        settings = SHORT | {"data.cache_dir": str(tmp_path / f"run/{number}/cache")}
        run = make_run(tmp_path / f"run/{number}", corpus, **settings)
        kill = at_operation(number, half=half, below=f"/run/{number}/")
        ended = launcher.run(run, faults=kill.faults)
        if ended.statuses == [0]:
            break
        newest, left_over = max(run.sound(), default=None), run.unfinished()
        launcher.finish(run)
        assert_resumed_from(run, run.record["attempt"], newest, left_over)
        assert run.counting() == whole.counting(), kill.name
        assert tensor_digests(run.step_folder(4)) == tensor_digests(whole.step_folder(4)), kill.name
        assert (run.committed()[0], run.unfinished()) == (4, []), kill.name
        if extra := names_in(run.folder) - names_in(whole.folder):
            litter[kill.name] = extra
    assert number > 100
    assert litter == {}, "files that no later start removes"


def descendants(pid: int) -> list[int]:
    """All living processes below ``pid``, and itself."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # the thread has ended
                found += [int(child) for child in task.read_text().split()]
    return found


def start_script(run: Run, *command: str) -> subprocess.Popen[bytes]:
    """Start ``command`` on the real script, as a user does."""
    return subprocess.Popen(
        [sys.executable, *command, str(REPO / "scripts" / "train.py"), f"--config={run.config}"],
        stdout=(run.base / "output.log").open("ab"),
        stderr=subprocess.STDOUT,
        cwd=run.base,
    )


def finish_script(run: Run, *command: str) -> None:
    process = start_script(run, *command)
    status = process.wait(250)
    assert status == 0, (run.base / "output.log").read_text()


def test_torchrun_killed_and_restarted_has_same_bits(
    corpus: Path, tmp_path: Path, references: Callable[[int], Run]
) -> None:
    run = make_run(tmp_path, corpus, **SETTINGS)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    process = start_script(run, *torchrun)
    wait_until(lambda: len(run.rows()) >= 12 or process.poll() is not None, "12 rows", timeout_s=200)
    for pid in descendants(process.pid):
        with contextlib.suppress(ProcessLookupError):  # a writer ends with its rank
            os.kill(pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, (run.base / "output.log").read_text()
    newest = run.sound()[0]
    finish_script(run, *torchrun)
    assert_resumed_from(run, 2, newest, [])
    assert_same_bits(run, references(2))


def test_script_plain_process_same_bits_as_forked(
    corpus: Path, tmp_path: Path, references: Callable[[int], Run]
) -> None:
    run = make_run(tmp_path, corpus, **SETTINGS)
    finish_script(run)
    assert_same_bits(run, references(1))
