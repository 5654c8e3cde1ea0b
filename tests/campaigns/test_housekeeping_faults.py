"""One file operation of a start or of a command fails: it goes on, or stops with one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.crash.errno_campaign import SCENARIOS, describe, prepare, record, run_all, sample
from support.crash.errno_shim import Operation, strikes_of

pytest_plugins = ["support.crash.fixtures"]

SEED = 20261129
SLICE = {"start": 24, "rollback": 6, "undo": 4, "fork": 6, "look": 6}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with every kind of leftover."""
    run = tmp_path_factory.mktemp("prepared") / "run"
    prepare(run)
    return run


@pytest.fixture
def operations_of(prepared: Path, scratch: Path) -> Callable[[str], list[Operation]]:
    """The operations of a scenario."""
    return lambda scenario: record(prepared, scenario, scratch / f"record-{scenario}")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_housekeeping_sampled_faults_end_nothing(
    prepared: Path, scratch: Path, operations_of: Callable[[str], list[Operation]], scenario: str
) -> None:
    strikes = sample(strikes_of(operations_of(scenario)), SLICE[scenario], SEED)
    counts = run_all(prepared, scenario, scratch, strikes)
    assert counts["went on"] >= 1


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_housekeeping_every_fault_ends_nothing(
    prepared: Path, scratch: Path, operations_of: Callable[[str], list[Operation]], scenario: str
) -> None:
    operations = operations_of(scenario)
    strikes = strikes_of(operations)
    counts = run_all(prepared, scenario, scratch, strikes)
    print(f"{scenario}: {len(operations)} operations, {len(strikes)} cases: {describe(counts)}")
