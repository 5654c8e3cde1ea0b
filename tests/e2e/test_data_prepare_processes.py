"""Preparing data beside other processes, killed half way, and on a full disk."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kempnerforge.data.prepare import ABANDONED_AFTER_S, prepare_cached
from kempnerforge.data.tokenizer import ByteTokenizer
from kempnerforge.data.tokens import open_dataset

pytest_plugins = ["support.text_fixtures"]
pytestmark = pytest.mark.smoke

BYTES = ByteTokenizer()


PREPARE = """
import sys
from pathlib import Path
from kempnerforge.data.prepare import prepare_cached
from kempnerforge.data.tokenizer import ByteTokenizer
print(prepare_cached([sys.argv[1]], ByteTokenizer(), Path(sys.argv[2]), progress={progress}))
"""


def test_data_prepare_concurrent_processes_agree(notes, tmp_path):
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", PREPARE.format(progress="None"), str(notes), str(cache)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    printed = [process.communicate(timeout=60)[0] for process in running]
    assert [process.returncode for process in running] == [0] * 4
    assert len(set(printed)) == 1
    assert [path.name for path in cache.iterdir()] == [Path(printed[0].strip()).name]
    open_dataset(printed[0].strip(), verify=True)


def test_data_prepare_killed_leaves_nothing_that_counts(notes, tmp_path):
    cache = tmp_path / "cache"
    kill = "lambda done, total: __import__('os').kill(__import__('os').getpid(), 9)"
    command = [sys.executable, "-c", PREPARE.format(progress=kill), str(notes), str(cache)]
    assert subprocess.run(command, timeout=60).returncode == -9
    (left,) = cache.iterdir()
    assert left.name.startswith(".")

    folder = prepare_cached([str(notes)], BYTES, cache)
    assert left.exists(), "it may still be in use"
    open_dataset(folder, verify=True)

    long_ago = time.time() - ABANDONED_AFTER_S - 60
    for path in (*left.iterdir(), left):
        os.utime(path, (long_ago, long_ago))
    (folder / "index.json").unlink()
    for file in folder.iterdir():
        file.unlink()
    assert prepare_cached([str(notes)], BYTES, cache) == folder
    assert not left.exists()


def test_data_prepare_full_disk_is_reported(notes, tmp_path):
    limited = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "from kempnerforge.errors import DataError\n"
        "try:\n"
        + "".join(f"    {line}\n" for line in PREPARE.format(progress="None").strip().splitlines())
        + "except DataError as error: print(error)"
    )
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", limited, str(notes), str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "cannot write prepared tokens" in done.stdout
    assert "data.cache_dir" in done.stdout
    assert not list(cache.iterdir())
