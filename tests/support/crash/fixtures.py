"""Fixtures of the campaigns. Use them with ``pytest_plugins = ["support.crash.fixtures"]``."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.crash.crash_campaign import Case, Recording, RecordingOf, record


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> RecordingOf:
    """Recordings of four saves by case. Each is made once."""
    made: dict[Case, Recording] = {}

    def get(case: Case) -> Recording:
        if case not in made:
            ranks, keep, no_direct = case
            base = tmp_path_factory.mktemp("recording")
            made[case] = record(base, ranks=ranks, keep_last_n=keep, no_direct=no_direct)
        return made[case]

    return get


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder in memory, where syncs cost nothing, because thousands of trees are written."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None, prefix="crash-") as folder:
        yield Path(folder)
