"""A real memory cgroup for a test, in the version (1 or 2) that the machine has."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path("/sys/fs/cgroup")


@contextlib.contextmanager
def memory_cgroup(limit_bytes: int) -> Iterator[Path]:
    """Create a memory cgroup, or skip the test. A pid written to its ``cgroup.procs`` adds a process."""
    v1 = (ROOT / "memory/memory.limit_in_bytes").exists()
    folder = (ROOT / "memory" if v1 else ROOT) / f"kempnerforge-test-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    try:
        try:
            (folder / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(limit_bytes))
        except OSError as error:
            pytest.skip(f"a cgroup's memory cannot be limited here: {error}")
        yield folder
    finally:
        os.rmdir(folder)
