"""Packings that several processes make at once, or on a full disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.token_folders import numbered, write_folder

PACK = """
import resource, sys
from pathlib import Path
from kempnerforge.data.tokens import RowOptions, open_dataset
from kempnerforge.errors import DataError
rows = RowOptions(packing="best_fit", cache_dir=Path(sys.argv[2]))
dataset = open_dataset(sys.argv[1], rows=rows)
if len(sys.argv) > 3:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    print(dataset.split("train", 64).num_samples)
except DataError as error:
    print(error)
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    lengths = np.random.default_rng(0).integers(1, 60, size=1500).tolist()
    return write_folder(tmp_path / "data", {"train": numbered(lengths)})


def test_packing_made_by_several_processes_is_one(data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", PACK, str(data), str(cache)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    printed = [process.communicate(timeout=60)[0] for process in running]
    assert [process.returncode for process in running] == [0] * 4
    assert len(set(printed)) == 1
    (path,) = cache.iterdir()
    made = path.read_bytes()
    path.unlink()
    subprocess.run(command, check=True, timeout=60)
    assert path.read_bytes() == made


def test_packing_full_disk_is_reported(data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", PACK, str(data), str(cache), "full"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "cannot write the packing" in done.stdout
    assert "data.cache_dir" in done.stdout
    assert not list(cache.iterdir())
