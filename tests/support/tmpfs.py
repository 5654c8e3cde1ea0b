"""A small real file system, for tests of full disks."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted_tmpfs(folder: Path, options: str, *, lazy: bool = False) -> Iterator[Path]:
    """``folder``, which is made, as a tmpfs with ``options``, such as ``size=8m``.

    Skips the test where none can be mounted. Fails it when a file is still open at the end, unless ``lazy``.
    """
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", *(["-l"] if lazy else []), str(folder)], check=True)
