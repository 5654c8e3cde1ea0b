"""One file operation of a start or of a command fails: it goes on, or stops with one line.

And what a training loop does while files are slow: its main thread does no file work and waits for none.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support.crash import errno_shim
from support.crash.errno_campaign import SCENARIOS, check, describe, record, run_all, sample, strike
from support.crash.errno_shim import Operation, Strike, strikes_of
from support.crash.errno_training import LOOPS, MODES, LoopOutcome, holds_of, run_loop

from kempnerforge.checkpoint.retention.start_cleanup import StartCleanup
from kempnerforge.checkpoint.run.owner import Owner
from kempnerforge.checkpoint.save_coordinator import SaveCoordinator

pytest_plugins = ["support.crash.fixtures"]

SEED = 20261129
SLICE = {"start": 24, "rollback": 6, "undo": 6, "fork": 6, "look": 6, "harness": 4}
HOLDS = 16
"""Operations of each loop that are held, each in a case of its own."""
PARTS = 16
"""Of the whole campaign, so that a part of it can be run: ``-k part00``."""

PreparedOf = Callable[[str], Path]


@pytest.fixture(scope="module")
def prepared_of(tmp_path_factory: pytest.TempPathFactory) -> PreparedOf:
    """A run's folder with every kind of leftover, by scenario. Each is made once."""
    made: dict[object, Path] = {}

    def get(scenario: str) -> Path:
        prepare = SCENARIOS[scenario].prepare
        if prepare not in made:
            made[prepare] = tmp_path_factory.mktemp("prepared") / "run"
            prepare(made[prepare])
        return made[prepare]

    return get


@pytest.fixture
def operations_of(prepared_of: PreparedOf, scratch: Path) -> Callable[[str], list[Operation]]:
    """The operations of a scenario."""
    return lambda scenario: record(prepared_of(scenario), scenario, scratch / f"record-{scenario}")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_housekeeping_sampled_faults_end_nothing(
    prepared_of: PreparedOf, scratch: Path, operations_of: Callable[[str], list[Operation]], scenario: str
) -> None:
    strikes = sample(strikes_of(operations_of(scenario)), SLICE[scenario], SEED)
    counts = run_all(prepared_of(scenario), scenario, scratch, strikes)
    assert counts["went on"] + counts["stopped with one line"] >= 1


@pytest.mark.slow
@pytest.mark.timeout(14400)
@pytest.mark.parametrize("part", [f"part{number:02d}" for number in range(PARTS)])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_housekeeping_every_fault_ends_nothing(
    prepared_of: PreparedOf,
    scratch: Path,
    operations_of: Callable[[str], list[Operation]],
    scenario: str,
    part: str,
) -> None:
    operations = operations_of(scenario)
    strikes = strikes_of(operations)
    random.Random(SEED).shuffle(strikes)
    mine = strikes[int(part[-2:]) :: PARTS]
    counts = run_all(prepared_of(scenario), scenario, scratch, mine)
    print(
        f"\n{scenario}, {part}: {len(operations)} operations, {len(mine)} of {len(strikes)} cases: "
        f"{describe(counts)}"
    )


def _find(operations: list[Operation], op: str, part: str) -> Operation:
    return next(one for one in operations if one.op == op and part in one.path)


def test_housekeeping_error_that_ends_start_noticed(
    prepared_of: PreparedOf,
    scratch: Path,
    operations_of: Callable[[str], list[Operation]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    what = Strike(_find(operations_of("start"), "rmdir", ".deleting"), "EPERM", always=True)
    monkeypatch.setattr(StartCleanup, "_try", lambda _self, work, _what: work())
    found = strike(prepared_of("start"), "start", scratch / "case", what)
    with pytest.raises(AssertionError, match="Operation not permitted"):
        check(prepared_of("start"), "start", scratch / "case", what, found)


def test_housekeeping_touched_foreign_step_noticed(
    prepared_of: PreparedOf,
    scratch: Path,
    operations_of: Callable[[str], list[Operation]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    what = Strike(_find(operations_of("start"), "symlink", ".latest"), "EPERM", always=True)
    monkeypatch.setattr(Owner, "owns", lambda _self, _provenance: True)
    found = strike(prepared_of("start"), "start", scratch / "case", what)
    with pytest.raises(AssertionError, match="was touched"):
        check(prepared_of("start"), "start", scratch / "case", what, found)


def _check_loop(found: LoopOutcome) -> None:
    assert found.main == [], found.output
    assert not found.gave_up, f"the loop waited for a file\n{found.output}"
    # Each log is waited for once, for 20 ms at most: while rows wait, the next ones do not.
    assert not found.waits.keys() - {"kempnerforge.write_behind"}, found.waits


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loop", LOOPS)
def test_loop_main_thread_waits_for_no_file(
    prepared_of: PreparedOf, scratch: Path, loop: str, mode: str
) -> None:
    found = run_loop(prepared_of(LOOPS[loop][0]), loop, mode, scratch / "loop", hold_all=True)
    _check_loop(found)
    assert found.held >= 3
    logs = {"own": 1, "harness": 2}[loop]
    assert found.waits.get("kempnerforge.write_behind", 0) <= logs, found.waits


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loop", LOOPS)
def test_loop_waits_for_no_operation_that_is_held(
    prepared_of: PreparedOf, scratch: Path, loop: str, mode: str
) -> None:
    prepared = prepared_of(LOOPS[loop][0])
    recorded = run_loop(prepared, loop, mode, scratch / "recorded")
    _check_loop(recorded)
    operations = holds_of(recorded)
    strikes = random.Random(SEED).sample(operations, min(HOLDS, len(operations)))
    held = 0
    for number, what in enumerate(strikes):
        found = run_loop(prepared, loop, mode, scratch / str(number), what)
        _check_loop(found)
        held += found.held > 0
    print(f"\n{loop}, {mode}: {len(operations)} operations, {held} of {len(strikes)} cases were held")
    assert held > len(strikes) / 2


def test_loop_file_work_of_main_thread_noticed(
    prepared_of: PreparedOf, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = SaveCoordinator.wait_for_staging
    monkeypatch.setattr(
        SaveCoordinator, "wait_for_staging", lambda saves: (os.listdir(saves.folder), wait(saves))
    )
    found = run_loop(prepared_of("start"), "own", "async", scratch / "loop")
    assert ["listdir", "run/checkpoints"] in found.main


def test_loop_wait_for_file_of_other_thread_noticed(
    prepared_of: PreparedOf, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = SaveCoordinator.wait_for_staging

    def look_on_thread(saves: SaveCoordinator) -> None:
        thread = threading.Thread(target=lambda: os.listdir(saves.folder))
        thread.start()
        thread.join()
        wait(saves)

    monkeypatch.setattr(SaveCoordinator, "wait_for_staging", look_on_thread)
    monkeypatch.setattr(errno_shim, "HELD_AT_MOST_S", 0.05)
    assert run_loop(prepared_of("start"), "own", "async", scratch / "loop", hold_all=True).gave_up
