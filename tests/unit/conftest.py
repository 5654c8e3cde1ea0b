"""Unit tests start no process: they stay fast, and they can run beside each other."""

from __future__ import annotations

import multiprocessing.util
import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes is no property of the product: a loaded machine may take any time.
settings.register_profile("unit", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unit")


@pytest.fixture(autouse=True)
def no_process_started(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test that starts a process, whichever thread does."""
    started: list[str] = []

    def refuse(*arguments: Any, **_: Any) -> Any:
        started.append(repr(arguments[-1]))
        raise OSError("a unit test may not start a process")

    monkeypatch.setattr(subprocess.Popen, "_execute_child", refuse)
    monkeypatch.setattr(multiprocessing.util, "spawnv_passfds", refuse)
    for name in ("fork", "forkpty", "posix_spawn", "posix_spawnp"):
        monkeypatch.setattr(os, name, refuse)
    yield
    if started:
        pytest.fail(f"a unit test may not start a process, and this one did: {started}")
