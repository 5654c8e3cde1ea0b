"""Fixtures for tests that train: ``pytest_plugins = ["support.run_fixtures"]``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.runs import Launcher, write_corpus


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    """A launcher that starts attempts of training."""
    started = Launcher()
    yield started
    started.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small text files: 152 training samples of 32 tokens."""
    return write_corpus(tmp_path_factory.mktemp("corpus"), seed=1)
